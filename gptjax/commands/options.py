"""Types of options that several commands share: each says what `--help` shows for its value."""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

ModelArgument = Annotated[
    Positional[str],
    tyro.conf.arg(
        metavar="MODEL", help="a run folder, a Hugging Face folder, or the name of a model on the Hugging Face hub"
    ),
]
Checkpoint = Annotated[str, tyro.conf.arg(metavar="last|best|STEP")]
DtypeOption = Annotated[Literal["float32", "bfloat16", "int8"] | None, tyro.conf.arg(metavar="float32|bfloat16|int8")]
IntOption = Annotated[int | None, tyro.conf.arg(metavar="N")]
FloatOption = Annotated[float | None, tyro.conf.arg(metavar="X")]
FileOption = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
FolderOption = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")]
ModelOption = Annotated[str | None, tyro.conf.arg(metavar="MODEL")]
TextOption = Annotated[str | None, tyro.conf.arg(metavar="TEXT")]
