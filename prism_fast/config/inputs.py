"""What a command reads: a model's folder, and data files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from prism_fast.config.values import NUMBER, Node, Place, Places, Tokens


class ModelConfig(Node):
    path: Place = Field(description="folder of a Hugging Face model, or its name on the hub")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 on a GPU, else float32")
    freeze_vision: bool = Field(False, description="do not train the vision encoder")
    freeze_embeddings: bool = Field(False, description="do not train the word embeddings")
    activation_checkpointing: bool = Field(False, description="compute activations twice, to keep fewer of them")


class DataConfig(Node):
    files: Places = Field(min_length=1, description="files, folders or patterns; images relative to their file")
    eval_files: Places = Field((), description="held-out data of the same kind of file")
    skip_bad_records: Annotated[int, Field(ge=0, le=10**9), NUMBER] = Field(0, description="bad records to pass over")
    max_prompt_tokens: Tokens = Field(2048, description="a longer prompt, its images included, is an error")
    system_prompt: str | None = Field(None, description="put before prompts that have none; null: nothing")
    columns: dict[str, str] = Field(
        {},
        description="our name of a field: the files' name, as {images: picture, reward_model.ground_truth: answer}",
    )
    image_folders: Places = Field(
        (),
        description="where else than in its file's folder an image may lie, links followed, and is looked for; "
        "/: anywhere",
    )
    cache: Place | None = Field(
        None, description="folder for what is made once of large files; null: run.out/cache, outside training none"
    )

    image_cache: Annotated[int, Field(ge=0, le=2**24), NUMBER] = Field(
        512, description="MiB of processed images that each process of a training run keeps, to use them again"
    )

    workers: Annotated[int, Field(ge=0, le=256), NUMBER] | Literal["auto"] = Field(
        "auto",
        description="processes that encode the next batch; 0: none; auto: a quarter of the cores, 1 to 8, none for a "
        "process with one core",
    )

    @property
    def reading(self) -> dict[str, Any]:
        """Options of data/formats.py's readers."""
        return {
            "skip_bad": self.skip_bad_records,
            "system_prompt": self.system_prompt,
            "columns": self.columns,
            "cache": self.cache,
            "image_folders": self.image_folders,
        }

    def beside(self, out: Path) -> DataConfig:
        """The same with the cache of a run in ``out``, where no other is given."""
        return self if self.cache is not None else self.model_copy(update={"cache": out / "cache"})
