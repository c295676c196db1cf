"""What our code never calls, found in the syntax tree whatever name it was imported under."""

import ast
import builtins
from collections.abc import Iterator

# Full names, each with whatever lies below it, and the files that may use them all the same.
FORBIDDEN: dict[str, frozenset[str]] = {
    # Runs code from data.
    "eval": frozenset(),
    "exec": frozenset(),
    "compile": frozenset(),
    "__import__": frozenset(),
    "runpy": frozenset(),
    "code": frozenset(),
    "pickle": frozenset(),
    "_pickle": frozenset(),
    "cPickle": frozenset(),
    "cloudpickle": frozenset(),
    "dill": frozenset(),
    "joblib": frozenset(),
    "marshal": frozenset(),
    "shelve": frozenset(),
    "pandas.read_pickle": frozenset(),
    "yaml": frozenset(  # what builds nothing: nodes, plain values, text
        {
            "cleangpt/settings_file.py",
            "distillation/recipes/__init__.py",
        }
    ),
    **{
        f"yaml.{name}": frozenset()
        for name in (
            *("load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all"),
            *("Loader", "FullLoader", "UnsafeLoader", "CLoader", "CFullLoader", "CUnsafeLoader"),
        )
    },
    "ctypes": frozenset({"benchmarks/scaling_worker.py"}),  # gives freed memory back
    "torch.load": frozenset({"cleangpt/restricted_load.py"}),
    "torch.serialization": frozenset(),
    "torch.jit": frozenset(),
    "torch.export": frozenset(),
    "torch.package": frozenset(),
    "torch.hub": frozenset(),
    "torch.distributed.checkpoint": frozenset(),
    "torch.utils.model_zoo": frozenset(),
    "accelerate.load_checkpoint_in_model": frozenset(),
    "accelerate.load_checkpoint_and_dispatch": frozenset(),
    "accelerate.Accelerator": frozenset(),  # its load_state unpickles
    "transformers.pipeline": frozenset(),
    "transformers.Trainer": frozenset(),  # its checkpoints hold a pickled training_args.bin
    # Starts a shell or another program.
    "os.system": frozenset(),
    "os.popen": frozenset(),
    "os.execv": frozenset(),
    "os.execvp": frozenset(),
    "os.spawnl": frozenset(),
    "os.spawnv": frozenset(),
    "os.startfile": frozenset(),
    "pty": frozenset(),
    "subprocess": frozenset(  # themselves
        {"benchmarks/memory.py", "benchmarks/scaling.py", "benchmarks/streaming.py"}
    ),
    # Speaks to the network; the libraries do, where the user named something on the hub.
    "socket": frozenset(),
    "http": frozenset(),
    "urllib": frozenset(),
    "urllib3": frozenset(),
    "requests": frozenset(),
    "httpx": frozenset(),
    "httpx2": frozenset(),
    "aiohttp": frozenset(),
    "ftplib": frozenset(),
    "smtplib": frozenset(),
    "webbrowser": frozenset(),
    "huggingface_hub.snapshot_download": frozenset(),
    "huggingface_hub.hf_hub_download": frozenset(),
    # Writes where somebody else may have put a link, or where an archive says.
    "tempfile.mktemp": frozenset(),
    "tarfile": frozenset(),
    "shutil.unpack_archive": frozenset(),
    # Waits for an answer on stdin, or shows HTML that is not escaped.
    "input": frozenset(),
    "breakpoint": frozenset(),
    "jinja2.Template": frozenset(),
}
# Keywords that are never passed with that value.
FORBIDDEN_KEYWORDS: tuple[tuple[str, object], ...] = (
    ("trust_remote_code", True),
    ("weights_only", False),
    ("allow_pickle", True),
    ("allow_all_kernels", True),
    ("use_kernels", True),
    ("shell", True),
    ("autoescape", False),
    ("verify", False),
)
# Methods by their last name, whatever they are called on.
FORBIDDEN_METHODS: dict[str, frozenset[str]] = {
    "add_safe_globals": frozenset(),
    "safe_globals": frozenset(),
    "extractall": frozenset(),
    "render_unsafe": frozenset(),
    "load_state": frozenset(),
    "push_to_hub": frozenset(),
    "get_session": frozenset({"cleangpt/hub.py"}),  # one probe: does the hub answer?
}
REQUIRED_KEYWORDS: dict[str, tuple[str, object]] = {
    "torch.load": ("weights_only", True),
    "jinja2.Environment": ("autoescape", True),
}
# Imports by a name that is computed: of our own modules only.
MAY_IMPORT_BY_NAME = frozenset({"cleangpt/data/__init__.py"})


def violations(tree: ast.AST, file: str) -> list[str]:
    """Every place in a file that breaks a rule above, as "line N: what".

    Args:
        tree: The parsed file.
        file: Its path in the repository, for the exceptions.
    """
    names = dict(_imported(tree))
    found = list(_bad_imports(tree, file))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
            full = _full_name(node, names)
            if full is not None and _is_forbidden(full, file):
                found.append(f"line {node.lineno}: {full}")
        if isinstance(node, ast.Attribute) and file not in FORBIDDEN_METHODS.get(
            node.attr, frozenset({file})
        ):
            found.append(f"line {node.lineno}: .{node.attr}")
        if isinstance(node, ast.Call):
            found += _bad_call(node, names, file)
    return found


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Local names, and what they stand for in full."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                yield (alias.asname, alias.name) if alias.asname else (top, top)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _bad_imports(tree: ast.AST, file: str) -> Iterator[str]:
    for node in ast.walk(tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        for module in modules:
            if _is_forbidden(module, file):
                yield f"line {node.lineno}: import {module}"


def _is_forbidden(full: str, file: str) -> bool:
    parts = full.split(".")
    heads = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return any(head in FORBIDDEN and file not in FORBIDDEN[head] for head in heads)


def _full_name(node: ast.expr, names: dict[str, str]) -> str | None:
    """``t.load`` as ``torch.load``; None for what is neither a built-in nor imported."""
    if isinstance(node, ast.Name):
        if node.id in names:
            return names[node.id]
        return node.id if node.id in FORBIDDEN and hasattr(builtins, node.id) else None
    if isinstance(node, ast.Attribute):
        before = _full_name(node.value, names)
        # An attribute of a built-in's name is something else: ``self.compile``, ``re.compile``.
        return None if before is None else f"{before}.{node.attr}"
    return None


def _bad_call(call: ast.Call, names: dict[str, str], file: str) -> Iterator[str]:
    full = _full_name(call.func, names) or ""
    values = {
        keyword.arg: keyword.value.value if isinstance(keyword.value, ast.Constant) else ...
        for keyword in call.keywords
    }
    for name, value in FORBIDDEN_KEYWORDS:
        if values.get(name) is value:
            yield f"line {call.lineno}: {name}={value}"
    if full in REQUIRED_KEYWORDS:
        name, value = REQUIRED_KEYWORDS[full]
        if values.get(name) is not value:
            yield f"line {call.lineno}: {full} without {name}={value}"
    if full == "importlib.import_module" and file not in MAY_IMPORT_BY_NAME:
        argument = call.args[0] if call.args else None
        if not isinstance(argument, ast.Constant):
            yield f"line {call.lineno}: an import by a computed name"
        elif _is_forbidden(str(argument.value), file):
            yield f"line {call.lineno}: import {argument.value}"
