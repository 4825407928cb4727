"""How a number is taken: contenders against float64, then side by side; processes of their own; results as JSON."""
