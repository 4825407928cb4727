"""Any spelling of an answer -> one plain spelling: ``\\frac{1}{2}``, ``½`` and ``$1/2$`` all become ``1/2``.

Pure text, linear time, bounded depth; nothing is evaluated.
"""

# ruff: noqa: SIM905 (a table of words reads best as words)
from __future__ import annotations

import re
import unicodedata

MAX_LENGTH = 4096
MAX_DEPTH = 24  # nested LaTeX groups; deeper text is not an answer a person would read

_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n")
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ]+")
_VULGAR = re.compile("[¼½¾⅐-⅞]")
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−–—‐‑‒―﹣", "-"),
        **dict.fromkeys("×✕✖⋅·∙∗", "*"),
        **dict.fromkeys("÷∕⁄", "/"),
        **dict.fromkeys("≈≃≅∼", "~"),
        **dict.fromkeys("’‘´′", "'"),
        **dict.fromkeys("“”″«»„「」『』《》", '"'),
        **dict.fromkeys("⟨〈", "("),
        **dict.fromkeys("⟩〉", ")"),
        **dict.fromkeys("\u00a0\u2009\u202f\u2007", " "),
        **{"º": "°", "˚": "°", "√": " sqrt", "∛": " cbrt", "π": " pi ", "∞": " inf ", "≤": "<=", "≥": ">=", "≠": "!="},
        **{"µ": "μ", "、": ",", "。": "."},
    }
)
_TEXT_COMMANDS = frozenset(
    "text textbf textit textrm textsf texttt textnormal mathrm mathbf mathit mathsf mathtt mathnormal mathcal mbox "
    "mathbb mathfrak mathscr boxed fbox bm boldsymbol emph underline unit si num ce operatorname".split()
)
_DROPPED = frozenset(
    "left right big Big bigg Bigg bigl bigr Bigl Bigr displaystyle textstyle limits quad qquad".split()
)
_SWITCHES = frozenset("rm bf it sf tt cal".split())  # of the font, up to the end of the group
_ACCENTS = {"overrightarrow": "vec", "widehat": "hat", "widetilde": "tilde", "overline": "bar"}
_ACCENTS |= {name: name for name in "vec hat tilde bar dot ddot".split()}
_COMMANDS = {
    **{"cdot": "*", "times": "*", "ast": "*", "div": "/", "pm": "±", "mp": "±", "pi": " pi ", "infty": " inf "},
    **{"le": "<=", "leq": "<=", "leqslant": "<=", "ge": ">=", "geq": ">=", "geqslant": ">=", "lt": "<", "gt": ">"},
    **{"ne": "!=", "neq": "!=", "approx": "~", "sim": "~", "simeq": "~", "circ": "°", "degree": "°", "cup": "∪"},
    **{"emptyset": "∅", "varnothing": "∅", "in": "∈", "colon": ":", "langle": "(", "rangle": ")", "lbrace": "{"},
    **{"rbrace": "}", "lbrack": "[", "rbrack": "]", "lvert": "|", "rvert": "|", "vert": "|", "prime": "'"},
    **{"angle": "∠", "triangle": "△", "cap": "∩", "subset": "⊂", "subseteq": "⊆", "supset": "⊃", "notin": "∉"},
    **{"land": "∧", "wedge": "∧", "lor": "∨", "vee": "∨", "lnot": "¬", "neg": "¬", "forall": "∀", "exists": "∃"},
    **dict.fromkeys(("to", "rightarrow", "longrightarrow"), "→"),
    **dict.fromkeys(("Rightarrow", "Longrightarrow", "implies"), "⇒"),
    **{"leftarrow": "←", "gets": "←", "uparrow": "↑", "downarrow": "↓", "leftrightarrow": "↔", "Leftrightarrow": "⇔"},
    **{"iff": "⇔", "parallel": "∥", "perp": "⊥", "nabla": "∇", "partial": "∂", "square": "□", "Box": "□", "mid": "|"},
    **{"dots": "...", "ldots": "...", "cdots": "...", "textdegree": "°", "euro": "€", "pounds": "£", "percent": "%"},
}
_SPACES = frozenset(" ,;:!>")
_GREEK = {
    unicodedata.name(letter).split()[-1].lower().replace("lamda", "lambda"): letter
    for letter in "αβγδεζηθικλμνξορςτυφχψω".replace("ς", "σ")
}
_GREEK |= {name.capitalize(): letter.upper() for name, letter in _GREEK.items()}
_GREEK |= {"varphi": "φ", "varepsilon": "ε", "vartheta": "θ", "varrho": "ρ", "varsigma": "σ"}
GREEK_COMMANDS = {letter: "\\" + name + " " for name, letter in _GREEK.items() if not name.startswith("var")}
GREEK_NAMES = {name: letter for name, letter in _GREEK.items() if name.islower() and name not in ("pi", "omicron")}
_COMMANDS |= {**_GREEK, "AA": "Å", "ohm": "Ω", "micro": "μ"}

# LaTeX's spaces. A tilde is one where no number follows; "~ 5" is "about 5".
_WIDE = re.compile(
    r"\\(?:thinspace|medspace|thickspace|enspace|enskip|space|nobreakspace|hfill)(?![A-Za-z])"
    r"|\\[hm]s(?:pace|kip)\*? ?(?:\{[^{}]{0,20}\}|[0-9.]{1,6} ?(?:em|pt|mm|cm|mu))"
    r"|(?<!\\)~(?= ?[A-Za-z\\{}%°µμΩÅ$])|(?<=[A-Za-z]{2})~(?=[0-9])|(?<=})~(?=[0-9])"
)
_ENVIRONMENT = re.compile(
    r"(?:\\left ?)?(?:\\\{|\\lbrace)? ?\\begin\{(cases|aligned|align\*?|gathered|split|array)\}(?:\{[lcr|]*\})?"
    r"(?P<rows>.*?)\\end\{\1\}(?: ?\\right ?\.)?",
    re.DOTALL,
)
_MATRIX = re.compile(
    r"\\left ?([(\[]) ?\\begin\{array\}\{[lcr|]*\}(?P<rows>[^{}]*)\\end\{array\} ?\\right ?[)\]]", re.DOTALL
)
_SET_BUILDER = re.compile(
    r"\\?\{ ?[a-z] ?(?:(?:\\in|∈) ?(?:\\mathbb ?\{?R\}?|ℝ|R) ?)?(?:\\mid|\||:) ?(?P<condition>[^{}]+?)\\?\}"
)
_EXP = re.compile(r"(?<![A-Za-z])\\?exp ?(?:\\left ?)?(?=[({])")
_ONE_I = re.compile(r"(?<![0-9.,A-Za-z^_{/])1 ?(?=i(?![A-Za-z0-9]))")
_BOLD = re.compile(r"(?<![\w)\]}])(\*\*|__)(?=[^\s*_])([^*]+?)(?<=[^\s*_])\1(?![\w(\[{])")
_ITALIC = re.compile(r"(?<![\w)\]}*])\*(?=[^\s*])([^*]+)(?<=[^\s*])\*(?![\w(*])")


_COMMAND = re.compile(r"\\([a-zA-Z]+|.)", re.DOTALL)
FUNCTIONS = "arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc log ln exp det lim max min gcd lcm".split()
_FUNCTION = re.compile(
    r"(?<![\\A-Za-z])(" + "|".join([*FUNCTIONS, "sqrt", "pi", "inf", *GREEK_NAMES]) + r")(?![A-Za-z])"
)
_TIMES_TEN = re.compile(r"(?<=[0-9]) ?[xX] ?(?=10 ?\^)")
_BY = re.compile(r"(?P<first>[0-9](?: ?[A-Za-z]{1,7})?) (?:x|by) (?=[0-9])")  # 5 cm x 3 cm
_GROUPED = re.compile(r"(?<![0-9'.,])[0-9]{1,3}(?:(?:'[0-9]{3})+|(?:\.[0-9]{3}){2,})(?![0-9'\".,])")  # 1'234, 1.234.567
_SPELLINGS = [  # of one thing
    (re.compile(r"\+ ?/ ?-|\+-"), "±"),
    (re.compile(r"-+>"), "→"),
    (re.compile(r"(?<=\)|\]) ?U ?(?=[(\[])"), "∪"),
    (re.compile(r"(?<![A-Za-z])angle (?=[A-Z]{1,3}(?![A-Za-z]))"), "∠"),
    (re.compile(r"(?:(?<![A-Za-z])triangle |Δ ?)(?=[A-Z]{3}(?![A-Za-z]))"), "△"),
    (re.compile(r"(?<![A-Za-z\\])log(2|10)(?= ?\()"), r"log_{\1}"),
    (re.compile(r"\\(kilo|milli|centi|mega|giga|nano|pico) ?\\(?=[a-z])"), r"\\\1"),  # \kilo\gram
    (re.compile(r"(?<=[0-9]) (?=E[+-]?[0-9])"), ""),
    (re.compile(r"^ ?#{1,6} "), ""),  # a heading
]
_MATRIX_OF_ROWS = re.compile(r"\[ ?(\[[^\[\]]*\](?: ?, ?\[[^\[\]]*\])*) ?\]")
_INTEGER = re.compile(r"[+-]?[0-9]+")


_GROUP = re.compile(
    r"(?P<empty>\{\})(?=[\^_])|\{(?P<above>[^{}\\]{1,40})\\over(?![A-Za-z])(?P<below>[^{}\\]{1,40})\}"
    r"|(?=\{ ?\\(?:rm|bf|it|sf|tt|cal)(?![A-Za-z])|\{[^{},;]{1,40}\} ?/|(?<=/)\{[^{},;]{1,40}\})"
)
_NEXT_DOT = re.compile(r"([0-9]{0,9})\\dot ?\{?([0-9])\}?")


class Unreadable(ValueError):
    """The text is nested deeper, or its braces are balanced worse, than anything a person would read."""


def to_plain(text: str) -> str:
    """The plain spelling of ``text``: ASCII operators, ``a/b``, ``sqrt(a)``, ``a^(b)``, no delimiters, one-space gaps.

    Raises `Unreadable` where groups nest deeper than `MAX_DEPTH` or do not close.
    """
    return re.sub(r"\s+", " ", _Latex(_undressed(text)).all()).strip()


def to_latex(text: str) -> str:
    """``text`` in LaTeX: what it writes in LaTeX stays, what it writes in plain characters gets commands and braces.

    >>> to_latex("sqrt(x)*2^10 <= pi")
    '\\\\sqrt{x}\\\\cdot 2^{10} \\\\le  \\\\pi'
    """
    text = _undressed(text).replace("*", r"\cdot ").replace("<=", r"\le ").replace(">=", r"\ge ")
    text = _FUNCTION.sub(lambda match: "\\" + {"inf": "infty"}.get(match[1], match[1]), text)
    text = re.sub(r"(?<![0-9.^_})A-Za-z])([0-9]+)/([0-9]+)(?= )", r"\\frac{\1}{\2}", text)  # 1/2 x is no 1/(2x)
    text = _MATRIX_OF_ROWS.sub(_matrix, text)
    text = "".join(GREEK_COMMANDS.get(character, character) for character in text)
    text = re.sub(r"\^([+-]?[0-9]{2,}|[+-][0-9])", r"^{\1}", text)
    pieces: list[str] = []
    closing: list[bool] = []  # per open parenthesis: whether it is an exponent's or a root's, which takes braces
    for at, character in enumerate(text):
        if character == "(":
            closing.append(text.endswith(("^", "\\sqrt"), 0, at))
            character = "{" if closing[-1] else character
        elif character == ")" and closing and closing.pop():
            character = "}"
        pieces.append(character)
    return "".join(pieces).strip()


def _matrix(match: re.Match[str]) -> str:
    rows = [row.replace(",", "&") for row in re.findall(r"\[([^\[\]]*)\]", match[1])]
    return r"\begin{pmatrix}" + r"\\".join(rows) + r"\end{pmatrix}"


def _undressed(text: str) -> str:
    text = _WIDE.sub(" ", _boxed(text).strip())
    text = _MATRIX.sub(lambda match: rf"\begin{{pmatrix}}{match['rows']}\end{{pmatrix}}", text)
    if builder := _SET_BUILDER.fullmatch(text.strip(" $")):
        text = builder["condition"]
    text = _ENVIRONMENT.sub(lambda match: _rows(match[1], match["rows"]), text)
    text = _delimiters(_characters(_lines(text)))
    text = _GROUPED.sub(lambda match: re.sub("['.]", "", match.group()), _BY.sub(r"\g<first> * ", text))
    for spelling, one in _SPELLINGS:
        text = spelling.sub(one, text)
    return _ONE_I.sub("", _EXP.sub("e^", text))


def _rows(environment: str, rows: str) -> str:
    """The rows of ``cases`` and the like as a list; a matrix stays what it is."""
    aligned = re.sub(r" ?& ?(?==)|(?<==) ?& ?", "", rows.strip().removesuffix("\\\\"))
    return re.sub(r",? ?& ?", ", ", aligned) if environment in ("cases", "array") else aligned.replace("&", " ")


def _boxed(text: str) -> str:
    """What stands in ``\\boxed{}``, else the whole text; different boxes are the items of a list."""
    boxes: list[str] = []
    end = 0
    while (start := text.find("\\boxed{", end)) >= 0:
        start, depth, end = start + len("\\boxed{"), 1, len(text)
        for at in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if depth == 0:
                end = at
                break
        boxes.append(text[start:end])
    return " and ".join(dict.fromkeys(boxes)) if boxes else text


def _lines(text: str) -> str:
    """Lines are items of a list: join them by ";", without their bullets."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) < 2:
        return text
    for mark in ("- ", "* ", "• "):
        if all(line.startswith(mark) for line in lines):
            lines = [line[len(mark) :] for line in lines]
    return "; ".join(line.rstrip(";,") for line in lines)


def _characters(text: str) -> str:
    text = re.sub(rf"(?<![0-9 ])({_VULGAR.pattern})(?=[A-Za-z(])", r"(\1)", text)
    text = _VULGAR.sub(lambda match: " " + unicodedata.normalize("NFKC", match.group()).replace("⁄", "/") + " ", text)
    text = re.sub("([0-9])\u0305", r"\\overline{\1}", text)
    text = _SUPERSCRIPTS.sub(lambda match: f"^({match.group().translate(_SUPERSCRIPT)})", text)
    text = re.sub(r"\^\(([0-9]+)\)(?![0-9(])", r"^\1", text)
    text = unicodedata.normalize("NFKC", text.translate(_CHARACTERS)).translate(_CHARACTERS)
    if len(text) > MAX_LENGTH:  # one character can stand for eighteen
        raise Unreadable(f"longer than {MAX_LENGTH} characters")
    if text.isascii():
        return text
    visible = (character for character in text if unicodedata.category(character) != "Cf")
    return "".join(str(unicodedata.decimal(character, character)) for character in visible)


def _delimiters(text: str) -> str:
    """Without markdown marks and math delimiters; a lone "$" is money."""
    for mark in ("**", "__", "*", "_", "`", '"', "'"):
        if text.count(mark) == 2 and text.startswith(mark) and text.endswith(mark):
            text = text.replace(mark, "")
    if text.count("`") == 2:
        text = text.replace("`", "")
    text = _BOLD.sub(r"\2", text)
    if re.search(r"[A-Za-z]{3}", text):  # not a product
        text = _ITALIC.sub(r"\1", text)
    text = _TIMES_TEN.sub("*", text.replace("**", "^"))
    for mark in (r"\(", r"\)", r"\[", r"\]", "$$"):
        text = text.replace(mark, " ")
    money = text.replace(r"\$", "\0")
    if money.count("$") % 2 == 0:
        text = money.replace("$", " ").replace("\0", r"\$")
    return text


def _in_parentheses(text: str) -> str:
    return text if text.isdecimal() or (len(text) == 1 and text.isalpha()) else f"({text})"


class _Latex:
    """One pass over LaTeX or plain text, left to right."""

    def __init__(self, text: str):
        self.text, self.at, self.depth = text, 0, 0

    def all(self) -> str:
        pieces: list[str] = []
        while self.at < len(self.text):
            pieces.append(self.element("".join(pieces[-2:])))
        return "".join(pieces)

    def element(self, before: str = "") -> str:
        """The plain spelling of what starts here: a command with its arguments, a script, or one character."""
        character = self.text[self.at]
        if character == "\\":
            return self._command(before)
        if character == "{" and (group := self._invisible_group()) is not None:
            return group
        self.at += 1
        if character in "^_":
            return self._script(character)
        if character == "{" and self.text.startswith(",}", self.at):  # 1{,}234
            self.at += 2
            return ","
        return character

    def _invisible_group(self) -> str | None:
        """A group of LaTeX that is no set: {\\rm cm}, {1 \\over 2}, {1}/{2}, {}^{14}C."""
        group = _GROUP.match(self.text, self.at)
        if group is None:
            return None
        if group["empty"] or group["above"]:
            self.at = group.end()
            return f"({group['above'].strip()})/({group['below'].strip()})" if group["above"] else ""
        return self._argument()

    def _command(self, before: str) -> str:
        match = _COMMAND.match(self.text, self.at)
        if match is None:  # a lone backslash ends the text
            self.at += 1
            return ""
        self.at = match.end()
        name = match[1]
        if name in ("frac", "dfrac", "tfrac", "cfrac"):
            return self._fraction(before)
        if name == "sqrt":
            return self._root()
        if name in _TEXT_COMMANDS:
            return self._argument()
        if name in ("SI", "qty"):
            return f"{self._argument()} {self._argument()}"
        if name in _SWITCHES:
            return self._argument() if self.text.startswith("{", self.at) else ""
        if name in _ACCENTS:
            return self._accent(name)
        if name in _DROPPED:
            if name in ("left", "right") and self.text.startswith(".", self.at):
                self.at += 1
            return " " if name in ("quad", "qquad") else ""
        if name in _GREEK:
            self.at += len(self.text) - self.at - len(self.text[self.at :].lstrip(" "))
        if name in _COMMANDS:
            return _COMMANDS[name]
        if name in _SPACES:
            return "" if name == "!" else " "
        if name == "\\":
            return "; "
        return name if len(name) == 1 and not name.isalpha() else f" {name} "

    def _accent(self, name: str) -> str:
        inside = self._argument().strip()
        if not inside.isdecimal() or name not in ("overline", "bar", "dot"):
            return f"{_ACCENTS[name]}({inside})"
        while name == "dot" and (more := _NEXT_DOT.match(self.text, self.at)):  # the period's first and last digit
            inside, self.at = inside + more[1] + more[2], more.end()
        return f"({inside}...)"

    def _fraction(self, before: str) -> str:
        above, below = self._argument().strip(), self._argument().strip()
        if above.isdecimal() and below.isdecimal():
            mixed = before.rstrip()[-1:].isdecimal()
            return f" {above}/{below}" if mixed else f"({above}/{below})"
        return f"({_in_parentheses(above)}/{_in_parentheses(below)})"

    def _root(self) -> str:
        index = ""
        if self.text.startswith("[", self.at) and (close := self.text.find("]", self.at, self.at + 8)) > 0:
            index = self.text[self.at + 1 : close].strip()
            self.at = close + 1
        inside = self._argument()
        return f"(({inside})^(1/({index})))" if index and index != "2" else f" sqrt({inside})"

    def _script(self, mark: str) -> str:
        if self.text.startswith("(", self.at):  # plain text: x^(2+1)
            return mark
        sign_and_digits = _INTEGER.match(self.text, self.at)
        if sign_and_digits:  # plain text: x^10, 10^-3; LaTeX would read one digit, a person reads them all
            self.at = sign_and_digits.end()
            inside = sign_and_digits.group()
        else:
            inside = self._argument().strip()
        if mark == "^" and inside in ("°", "'", "''"):
            return inside
        if inside.isdecimal() or len(inside) == 1 or (mark == "_" and inside.isalnum()):
            return mark + inside
        return f"{mark}({inside})"

    def _argument(self) -> str:
        """The next group without its braces, or the next single element."""
        while self.text.startswith(" ", self.at):
            self.at += 1
        if self.at >= len(self.text):
            return ""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable(f"groups nest deeper than {MAX_DEPTH}")
        if self.text.startswith("{", self.at):
            self.at += 1
            inside = self._group()
        else:
            inside = self.element()
        self.depth -= 1
        return inside

    def _group(self) -> str:
        pieces: list[str] = []
        while not self.text.startswith("}", self.at):
            if self.at >= len(self.text):
                raise Unreadable("a group does not close")
            if self.text.startswith("{", self.at) and not self.text.startswith("{,}", self.at):
                pieces.append(self._argument())
            else:
                pieces.append(self.element("".join(pieces[-2:])))
        self.at += 1
        return "".join(pieces)
