"""Functions of the user's own: where they come from, and how what they raise is told.

A reference names one: "FILE.py:function", or "package.module:function" of what can be imported.
Whatever happens in such a function is told in one line, as a mistake in the input, with the line
of the user's own file where it happened.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from tfloop import plain_files
from tfloop.errors import UserError
from tfloop.wording import first_sentence, listed


@contextlib.contextmanager
def told_in_one_line(what: str, cure: str = "") -> Iterator[None]:
    """Whatever is raised in this block becomes a UserError: "WHAT: KIND: first sentence; CURE"."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever a function of one's own may raise
        ending = f"; {cure}" if cure else ""
        raise UserError(f"{what}: {first_sentence(error)}{ending}") from None


def is_reference(text: str) -> bool:
    """Does it name a function: "FILE.py:function" or "package.module:function"?"""
    source, colon, function = text.rpartition(":")
    if not colon or not function.isidentifier():
        return False
    return source.endswith(".py") or all(part.isidentifier() for part in source.split("."))


class Code(NamedTuple):
    """A function that was loaded, and the source that it came with.

    Attributes:
      reference: as the user gave it.
      function: the function.
      files: path → content, of its own file and those beside it that were imported with it.
    """

    reference: str
    function: Callable
    files: dict[str, str]

    def call(self, flag: str, known: Mapping[str, Any], options: Mapping[str, str]) -> Any:
        """What the function gives for those of the known arguments that it takes.

        Args:
          flag: that names the function, for messages.
          known: what is handed in by name, where the function takes it.
          options: of the user's own; texts are read as Python's numbers, booleans and None.

        Raises:
          UserError: an argument that is missing, an option that it does not take, or what it
            raises.
        """
        accepted = self.parameters(flag)
        takes_all = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        given = {name: value for name, value in known.items() if name in accepted}
        for name, text in options.items():
            if not takes_all and (name not in accepted or name in known):
                raise UserError(
                    f"--{_options(flag)}: {self.reference} takes no {name}; it takes "
                    f"{listed(accepted) or 'nothing'}"
                )
            given[name] = parsed(text)
        missing = [
            name
            for name, p in accepted.items()
            if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            if name not in given
        ]
        if missing:
            raise UserError(
                f"--{flag}={self.reference}: the function needs {missing[0]}, which is none of "
                f"{listed(known) or 'nothing'}; give it a default, or --{_options(flag)}="
                f"{missing[0]}=VALUE"
            )
        folder = Path(next(iter(self.files), "")).resolve().parent
        with beside(folder), self.told(flag):
            return self.function(**given)

    def parameters(self, flag: str) -> dict[str, inspect.Parameter]:
        with told_in_one_line(f"--{flag}={self.reference}"):
            return dict(inspect.signature(self.function).parameters)

    def told(self, flag: str) -> contextlib.AbstractContextManager[None]:
        """Errors in this block are told with the line of the user's own code."""
        return _told_with_line(f"--{flag}={self.reference}", list(self.files))


def _options(flag: str) -> str:
    """The setting that holds the options of the function that another names."""
    return "data_options" if flag == "dataset" else f"{flag}_options"


def options_of(pairs: Sequence[str], flag: str) -> dict[str, str]:
    """{name: text} of "name=text" pairs.

    Raises:
      UserError: one that is no such pair; `flag` names it.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--{flag}: {pair!r}: expected NAME=VALUE, several with commas between")
        found[name] = value
    return found


def parsed(text: str) -> Any:
    """An option's text as a number, a boolean or None, where it is one; else as it is."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def digest_of(files: Mapping[str, str]) -> str:
    """SHA-256 over the names and the contents of files."""
    sha = hashlib.sha256()
    for path in sorted(files):
        sha.update(f"{path}\n{files[path]}\n".encode())
    return sha.hexdigest()


@contextlib.contextmanager
def _told_with_line(what: str, files: list[str]) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever a user's own code may raise
        where = _line_of(error, files)
        raise UserError(f"{what}: {where}{first_sentence(error)}") from None


def _line_of(error: BaseException, files: list[str]) -> str:
    """ "FILE.py, line 7: ", the last of the user's own lines that the error went through."""
    known = {str(Path(file).resolve()): file for file in files}

    def own(filename: str | None) -> str:
        return known.get(str(Path(filename).resolve()), "") if filename else ""

    if isinstance(error, SyntaxError) and own(error.filename):
        return f"{own(error.filename)}, line {error.lineno}: "
    frames = [f for f in traceback.extract_tb(error.__traceback__) if own(f.filename)]
    return f"{own(frames[-1].filename)}, line {frames[-1].lineno}: " if frames else ""


def load(reference: str, flag: str, or_dict: bool = False) -> Code:
    """The function that a reference names.

    Args:
      reference: "FILE.py:function" or "package.module:function".
      flag: that gave it, for messages.
      or_dict: it may be a dict, too.

    Raises:
      UserError: a file that is missing or does not import, or has no such function.
    """
    source, _, name = reference.rpartition(":")
    is_file = source.endswith(".py")
    module = _load_file(Path(source), f"--{flag}={reference}") if is_file else None
    module = module or _import(source, f"--{flag}={reference}")
    function = getattr(module, name, None)
    if not callable(function) and not (or_dict and isinstance(function, dict)):
        functions = [
            n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_")
        ]
        raise UserError(
            f"--{flag}={reference}: {module.__file__} has no function {name}; it has "
            f"{listed(functions) or 'none'}"
        )
    return Code(reference, function, _sources(module))


_LOADED: dict[Path, tuple[str, ModuleType]] = {}  # path → (content, module): imported once
_IMPORTED: dict[ModuleType, list[ModuleType]] = {}  # a file → what it imported from its folder
_HELPERS: dict[Path, set[str]] = {}  # folder → modules that lie beside what was loaded from there


def _load_file(path: Path, what: str) -> ModuleType:
    try:
        content = plain_files.read_text(path)
    except UnicodeDecodeError:
        raise UserError(f"{what}: {path} is no text in UTF-8") from None
    except OSError as error:
        raise UserError(f"{what}: {path} cannot be read: {error.strerror}") from None
    place = path.resolve()
    if place in _LOADED and _LOADED[place][0] == content:
        return _LOADED[place][1]
    name = f"tfloop_user_{path.stem}_{hashlib.sha256(str(place).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    for folder, names in _HELPERS.items():
        if folder != place.parent:  # this file's own of the same name is meant
            for helper in names:
                sys.modules.pop(helper, None)
    before = set(sys.modules)
    sys.modules[name] = module  # as Keras's registration of classes and pickle want it
    try:
        with beside(place.parent), _told_with_line(what, [str(path)]):
            spec.loader.exec_module(module)
    except UserError:
        del sys.modules[name]
        raise
    helpers = {n for n in set(sys.modules) - before if _is_under(place.parent, sys.modules[n])}
    _HELPERS.setdefault(place.parent, set()).update(helpers - {name})
    _IMPORTED[module] = [sys.modules[n] for n in sorted(helpers - {name})]
    _LOADED[place] = content, module
    return module


@contextlib.contextmanager
def beside(folder: Path) -> Iterator[None]:
    """In this block what lies in the folder can be imported."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _import(source: str, what: str) -> ModuleType:
    with beside(Path("").resolve()), _told_with_line(what, []):  # as `python -m` has it
        return importlib.import_module(source)


def _is_under(folder: Path, module: Any) -> bool:
    """Is it a module of the user's own, in the folder or in one below?"""
    file = getattr(module, "__file__", None)
    if not file or not file.endswith(".py"):
        return False
    place = Path(file).resolve()
    is_installed = "site-packages" in place.parts or Path(__file__).parent in place.parents
    return folder in place.parents and (not is_installed or place.parent == folder)


def _sources(module: ModuleType) -> dict[str, str]:
    """path → content of a module's file, and of those below its folder that it uses."""
    if not module.__file__:
        return {}
    folder = Path(module.__file__).resolve().parent
    seen, left = {id(module): module}, [module]
    for used in _IMPORTED.get(module, ()):
        seen[id(used)] = used
        left.append(used)
    while left:
        for value in list(vars(left.pop()).values()):
            is_module = isinstance(value, ModuleType)
            of = value if is_module else sys.modules.get(str(getattr(value, "__module__", "")))
            if of is not None and id(of) not in seen and _is_under(folder, of):
                seen[id(of)] = of
                left.append(of)
    found = {}
    for path in (Path(str(used.__file__)) for used in seen.values()):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            found[str(path)] = plain_files.read_text(path)
    return found
