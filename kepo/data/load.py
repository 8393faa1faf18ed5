"""Questions, with options and images or without, read in any of LAYOUTS.

    kepo data check PATH        # reads everything once and lists what is wrong

OmniMedVQA as published (``omnimedvqa``), Med-R1's split files (``medr1``), JSON Lines and lists
(``json_records``), Parquet (``parquet``), what ``datasets.save_to_disk`` wrote (``saved_dataset``),
and names on the Hub (``hub``).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from kepo.data.example import LETTERS, UNKNOWN, Example
from kepo.data.images import load_image, locate, open_rgb
from kepo.data.layouts import (
    arrow,
    from_python,
    hub,
    json_records,
    medr1,
    omnimedvqa,
    parquet,
    saved_dataset,
    schema,
)
from kepo.data.records import (
    KINDS,
    BadRecord,
    Parsed,
    RecordProblem,
    Sources,
    counted,
    read_list,
    repeated,
    shown,
)
from kepo.disk.files import each_data_file, ends, expanded, printable
from kepo.errors import KepoConfigError, KepoDataError, disk_sentence

__all__ = [
    "LETTERS",
    "UNKNOWN",
    "DataReport",
    "Example",
    "layout_of",
    "load_examples",
    "load_image",
    "load_omnimedvqa",
    "open_rgb",
]


@dataclass(frozen=True)
class Layout:
    """The functions that read one kind of dataset; ``records`` says what rows and parse promise."""

    name: str
    rows: Callable[[Path], Iterator[tuple[str, Any]]]
    parse: Callable[[Any, str], Parsed]
    quirks: Callable[[dict[str, Any], Example], list[str]] = lambda record, example: []


OMNIMEDVQA = Layout("OmniMedVQA", omnimedvqa.rows, omnimedvqa.parse, omnimedvqa.quirks)
MEDR1 = Layout("Med-R1 split", medr1.rows, medr1.parse)
RECORDS = Layout("JSON records", json_records.rows, schema.parse, schema.quirks)
PARQUET = Layout("Parquet", parquet.rows, arrow.parse, arrow.quirks)
HF = Layout("datasets folder", saved_dataset.rows, arrow.parse, arrow.quirks)
HUB = Layout("Hub dataset", hub.rows, arrow.parse, arrow.quirks)
LAYOUTS = (OMNIMEDVQA, MEDR1, RECORDS, PARQUET, HF, HUB)
FROM_PYTHON = "list from Python"
"""The name of the layout of questions that come as an argument."""


class Found(NamedTuple):
    """A good record, its place in the dataset, and the example made of it."""

    where: str
    example: Example
    sources: Sources
    record: dict[str, Any]

    def equals(self, other: Found) -> bool:
        """Return whether question and images are the same; images fetched by a function never
        are."""
        return (self.example, self.sources) == (other.example, other.sources)


@dataclass(frozen=True)
class DataReport:
    """The report of a loader: how much it read and kept, and everything it left out."""

    path: Path
    layout: str
    records: int
    """The number of records that were read."""
    questions: int
    """The number of questions kept after filters, limits and bad records."""
    problems: tuple[RecordProblem, ...]
    """The problems, one per record that was left out because something is wrong with it."""
    quirks: dict[str, int]
    """Departures from the published schema that were understood, and how many records have them."""

    def counts(self) -> dict[str, int]:
        """The number of records left out, by kind of problem."""
        found = Counter(problem.kind for problem in self.problems)
        return {kind: found[kind] for kind in KINDS if found[kind]}

    def summary(self) -> str:
        """Return one line; if there are problems, a second one counts them and names the first."""
        line = (
            f"{printable(self.path)}: {self.questions} of {self.records} questions ({self.layout})"
        )
        if not self.problems:
            return line
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.counts().items())
        return f"{line}\n  {counted(self.counts())} left out: {kinds}; first: {self.problems[0]}"


def layout_of(path: str | Path) -> Layout:
    """Return the layout of a folder, a file or a name; KepoDataError if it has none of LAYOUTS, or
    files of two."""
    path = expanded(path)
    try:
        if (path / omnimedvqa.FOLDER).is_dir():
            return OMNIMEDVQA
        if any((path / name).is_file() for name in (saved_dataset.DICT, saved_dataset.SINGLE)):
            return HF
        if layouts := _by_files(path):
            if len(layouts) == 1:
                return layouts[0]
            names = " and ".join(layout.name for layout in layouts)
            raise KepoDataError(
                f"{printable(path)} holds files of {names}; give the file, or a folder of one kind"
            )
        if hub.is_name(path):
            return HUB
        found = (
            "is not there" if not path.exists() else "is not a dataset in a layout that kepo reads"
        )
    except OSError as error:  # no permission, or a disk that is gone
        raise KepoDataError(disk_sentence(error)) from error
    raise KepoDataError(
        f"{printable(path)} {found}; expected a folder with {omnimedvqa.FOLDER}, one written by "
        "datasets.save_to_disk, JSON Lines, JSON lists or Parquet files of question and answer (or "
        "of image, problem, solution), or the name of a dataset on the Hub"
    )


def _by_files(path: Path) -> list[Layout]:
    """Return the layouts whose files a folder holds; a file is taken for one of its kind.

    JSON lists are told apart by the first record: Med-R1's has no question, prompt or messages.
    """

    def files(*endings: str) -> Iterator[Path]:
        if path.is_dir():
            return each_data_file(path, *endings)
        return iter([path] if ends(path.name, *endings) and path.is_file() else [])

    found = []
    if next(files(*json_records.LINES), None):
        found.append(RECORDS)
    if next(files(*parquet.ENDS), None):
        found.append(PARQUET)
    first = next(filter(None, map(_first_record, files(".json"))), {})
    if {*schema.ASKS} & {*first}:
        return [RECORDS, *(layout for layout in found if layout is not RECORDS)]
    if "problem" in first or (first and not found):
        found.append(MEDR1)
    elif not found and next(files(".json"), None):
        found.append(RECORDS)  # which says what is wrong with them
    return found


def _first_record(file: Path) -> dict[str, Any] | None:
    """Return the first object of a JSON list; None if the file holds none."""
    return next((record for _, record in read_list(file) if isinstance(record, dict)), None)


def load_examples(
    path: str | Path | Iterable[Any],
    *,
    modalities: Sequence[str] | None = None,
    question_types: Sequence[str] | None = None,
    limit: int | None = None,
    image_root: str | Path | None = None,
    bad_records: str = "skip",
    progress: bool = False,
) -> tuple[list[Example], DataReport]:
    """Read a dataset of any layout, in the order of its sorted files.

    path: a folder, a file or a name on the Hub; or the questions themselves, a list of `Example` or
        of dicts (``layouts.from_python``).
    modalities, question_types: keep only these; None keeps all.
    limit: keep only the first ``limit`` of these; None keeps all.
    image_root: the folder where image paths begin. They must not leave it, except through a folder
        in it that is itself a link (``images.locate``). None = the dataset's folder, or that of its
        file; for Med-R1's files the nearest folder above them that has ``Images``; for a name on
        the Hub the cache of ``datasets``; for a list the working directory, which paths may leave.
    bad_records: "skip" leaves out and reports records with which something is wrong, "fail" raises
        at the first.
    progress: show a bar.

    ``~`` in a path is the home folder. Files and folders whose names begin with a dot are passed
    over, as are trash and system folders (``files.SYSTEM``). If records share an id, the first is
    kept if their contents are the same, and none if they differ. The images must exist;
    ``images.digests_of`` tells whether they can be decoded.
    Raises KepoDataError for an unknown layout, an unknown name in a filter, or if nothing is left.
    """
    if isinstance(path, (str, Path)):
        layout, place = layout_of(path), expanded(path)
    else:
        layout, place = _of_list(from_python.listed(path), image_root), Path(from_python.NAME)
    return _load(
        layout, place, modalities, question_types, limit, image_root, bad_records,
        progress,
    )  # fmt: skip


def _of_list(data: Sequence[Any], image_root: str | Path | None) -> Layout:
    folder = Path.cwd() if image_root is None else None
    return Layout(
        FROM_PYTHON,
        lambda path: from_python.rows(data),
        partial(from_python.parse, folder=folder),
        from_python.quirks,
    )


def load_omnimedvqa(
    root: str | Path,
    *,
    modalities: Sequence[str] | None = None,
    question_types: Sequence[str] | None = None,
    limit: int | None = None,
) -> list[Example]:
    """Call ``load_examples`` for data whose records must all be right: the first bad one raises."""
    return _load(OMNIMEDVQA, expanded(root), modalities, question_types, limit, None, "fail")[0]


def _load(
    layout: Layout,
    path: Path,
    modalities: Sequence[str] | None,
    question_types: Sequence[str] | None,
    limit: int | None,
    image_root: str | Path | None,
    bad_records: str,
    progress: bool = False,
) -> tuple[list[Example], DataReport]:
    if limit is not None and limit < 1:
        raise KepoConfigError(f"limit is {limit}; give None or a number >= 1")
    if bad_records not in ("skip", "fail"):
        raise KepoConfigError(f"bad_records is {bad_records!r}; expected 'skip' or 'fail'")
    root = _image_root(layout, path, image_root)
    path = _place(layout, path)
    problems: list[RecordProblem] = []

    def bad(where: str, error: BadRecord, name: object) -> None:
        told = f" (question {shown(name)})" if isinstance(name, str) else ""
        problem = RecordProblem(error.kind, where, f"{error}{told}")
        if bad_records == "fail":
            raise KepoDataError(str(problem))
        problems.append(problem)

    parsed: dict[str, list[Found]] = {}
    quirks: Counter[str] = Counter()
    records = 0
    rows = tqdm(layout.rows(path), desc=path.name, unit=" records", disable=not progress)
    for where, record in rows:
        records += not (isinstance(record, BadRecord) and record.kind == "file")
        try:
            if isinstance(record, BadRecord):
                raise record
            example, sources = layout.parse(record, where)
        except BadRecord as error:
            fields = record if isinstance(record, dict) else {}
            bad(where, error, fields.get("question_id", fields.get("id")))
            continue
        parsed.setdefault(example.id, []).append(Found(where, example, sources, record))
    unique = _unique(layout, parsed.values(), bad, quirks)
    if unique:  # otherwise the names are not to blame
        examples = [found.example for found in unique]
        _check_names("modalities", modalities, {e.modality for e in examples})
        _check_names("question_types", question_types, {e.question_type for e in examples})
    kept: list[Example] = []
    # Only what is returned is looked up on disk: a subset may be used without all 88,996 images.
    for where, example, sources, _ in unique:
        if modalities is not None and example.modality not in modalities:
            continue
        if question_types is not None and example.question_type not in question_types:
            continue
        if len(kept) == limit:
            break
        try:
            kept.append(replace(example, images=locate(sources, root)))
        except BadRecord as error:
            bad(where, error, example.id)
    report = DataReport(path, layout.name, records, len(kept), tuple(problems), dict(quirks))
    if not kept:
        raise KepoDataError(f"{report.summary()}; no question is left")
    return kept, report


def _unique(
    layout: Layout,
    by_id: Iterable[Sequence[Found]],
    bad: Callable[[str, BadRecord, object], None],
    quirks: Counter[str],
) -> list[Found]:
    """Return one record for every id, and count its quirks; records that share an id and differ
    are bad."""
    unique: list[Found] = []
    for same in by_id:
        found = same[0]
        if not all(other.equals(found) for other in same[1:]):
            for other in same:
                bad(other.where, _not_unique(other, same), other.example.id)
            continue
        quirks.update(layout.quirks(found.record, found.example))
        if repeated(found.example.options):
            quirks["two wrong options are the same"] += 1
        if len(same) > 1:
            quirks["the same record once more"] += len(same) - 1
        unique.append(found)
    return unique


def _not_unique(found: Found, same: Sequence[Found]) -> BadRecord:
    """Return the BadRecord for one of several records that share an id and differ.

    Nobody can tell which of them is meant; it need not be the first, as a copy's name often sorts
    first.
    """
    others = [other.where for other in same if other is not found]
    return BadRecord(
        "duplicate id",
        f"the id {found.example.id!r} has other contents at {shown(others)}; all of them are left "
        "out: remove the copies, or give ids that are unique",
    )


def _place(layout: Layout, path: Path) -> Path:
    """Return the absolute path of a dataset; a name on the Hub is none.

    A file of records keeps its own name where it is a link, as in the Hub's cache, where the
    target's has no ending and images lie beside the link.
    """
    if layout is HUB or layout.name == FROM_PYTHON:
        return path
    if layout in (RECORDS, PARQUET) and path.is_file():
        return path.parent.resolve() / path.name
    return path.resolve()


def _image_root(layout: Layout, path: Path, given: str | Path | None) -> Path:
    if given is not None:
        folder = expanded(given)
        if not folder.is_dir():
            raise KepoDataError(f"image_root={str(given)!r} is not a folder")
        return folder.resolve()
    if layout is HUB:
        return hub.cache(path).resolve()
    if layout.name == FROM_PYTHON:
        return Path(Path.cwd().anchor)
    resolved = path.resolve()
    if layout is not MEDR1:
        place = _place(layout, path)
        return place if place.is_dir() else place.parent
    # If the file or folder is a link, look beside its target, then beside the link.
    link = Path(os.path.abspath(path))
    for folder in (resolved, *resolved.parents, link, *link.parents):
        if (folder / "Images").is_dir():
            return folder.resolve()
    raise KepoDataError(
        f"{printable(path)}: no folder above it has Images; set image_root (--image-root) to the "
        "one that does"
    )


def _check_names(argument: str, wanted: Sequence[str] | None, present: set[str]) -> None:
    if wanted is None:
        return
    if isinstance(wanted, str):
        raise KepoConfigError(f"{argument}={wanted!r} is a string; give a sequence of names")
    if unknown := sorted(set(wanted) - present):
        raise KepoDataError(
            f"{argument} names {unknown}, which the dataset lacks; it has {sorted(present)}"
        )
