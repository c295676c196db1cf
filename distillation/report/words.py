"""The sentences of a page: the story of a run, its key figures, and what to type for the rest."""

import math
import shlex
from pathlib import Path
from typing import Any

from cleangpt.errors import UsageError
from cleangpt.settings_file import written_settings
from distillation.evaluation import tables
from distillation.evaluation.flags import EVALUATE, evaluation_flags
from distillation.evaluation.results import EvaluationResult
from distillation.recipes import RECIPES, Recipe
from distillation.report.run_files import Run, group, is_count, number, shown

BUILTIN_ASSETS = "cleangpt/builtin/assets"
ENDINGS = {
    "stopped": "It was stopped before its end; the command that began it goes on with --resume.",
    "failed": "It failed before its end.",
    "killed": "It ended without a word: its process is no more. The command that began it goes on"
    " from its last checkpoint with --resume.",
    "running": "It is going on.",
    "overwritten": "It is being overwritten by another run.",
}


def teacher_name(run: Run) -> str:
    """The teacher as a person calls it."""
    name = str(group(run.manifest.get("teacher")).get("name") or "")
    if Path(name).as_posix().endswith(BUILTIN_ASSETS):
        return "builtin"
    return Path(name).name or str(group(run.manifest.get("teacher")).get("class", "unknown"))


def student_kind(run: Run) -> str:
    """What kind of student it is."""
    config = group(run.manifest.get("student_config"))
    kind = config.get("model_type") or group(run.manifest.get("student")).get("class")
    return str(kind or "unknown")


def student_shape(run: Run) -> str:
    """Blocks and width, as far as its configuration says."""
    config = group(run.manifest.get("student_config"))
    blocks = config.get("n_layer", config.get("num_hidden_layers"))
    width = config.get("n_embd", config.get("hidden_size"))
    if not is_count(blocks) or not is_count(width):
        return ""
    return f"{blocks} x {width}"


def seconds_taken(run: Run) -> float:
    """The whole run if it ended, else the stages that did."""
    whole = number(group(run.manifest.get("results")).get("seconds"))
    if math.isfinite(whole):
        return whole
    return sum([s for row in run.rows if math.isfinite(s := number(row.get("seconds")))], 0.0)


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def story(run: Run | None, result: EvaluationResult | None) -> str:
    """What happened and what came of it."""
    sentences = [] if run is None else _training_story(run)
    if result is not None:
        sentences.append(tables.summary(result))
        sentences += _furthest_block(result)
    else:
        sentences.append("The student has not been evaluated yet.")
    return " ".join(sentences)


def _training_story(run: Run) -> list[str]:
    student, teacher = group(run.manifest.get("student")), group(run.manifest.get("teacher"))
    shape = student_shape(run)
    size = (
        f" of {student['parameters']:,} parameters" if is_count(student.get("parameters")) else ""
    )
    theirs = f" ({teacher['parameters']:,})" if is_count(teacher.get("parameters")) else ""
    form = f", {shape.replace(' x ', ' blocks of width ')}," if shape else ""
    verb = "learnt" if run.status == "done" else "learns"
    tokens = max([0, *(row["tokens"] for row in run.blocks if is_count(row.get("tokens")))])
    amount = f" on {tokens:,} tokens per block" if tokens else ""
    first = (
        f"A {student_kind(run)} student{size}{form} {verb} from the teacher"
        f" {teacher_name(run)}{theirs}{amount}, in {duration(seconds_taken(run))} on"
        f" {run.manifest.get('device', 'an unknown device')}."
    )
    sentences = [first, _stages_story(run)]
    if run.status in ENDINGS:
        sentences.append(ENDINGS[run.status])
        if run.status == "failed" and run.manifest.get("reason"):
            sentences.append(f"The reason: {run.manifest['reason']}.")
    return [sentence for sentence in sentences if sentence]


def _stages_story(run: Run) -> str:
    schedule = str(run.settings.get("schedule", "sequential"))
    how = {
        "sequential": "one after another",
        "parallel_local": "together, in one pass over the data",
        "decoupled": "apart from each other, on the teacher's states",
    }.get(schedule, "")
    done = len(run.blocks)
    parts = [
        f"{done} block{'s' * (done != 1)} learnt {how}".strip() if done else "no block is done"
    ]
    rows = {row.get("stage"): row for row in run.rows}
    if "lm-head" in rows:
        steps = rows["lm-head"].get("steps")
        trained = f"the head was trained for {steps} steps"
        parts.append(trained if steps else "the head was set and not trained")
    if "polish" in rows:
        steps = rows["polish"].get("steps", 0)
        parts.append(f"the whole student was polished for {steps} steps")
    text = ", then ".join(parts)
    return f"{text[:1].upper()}{text[1:]}."


def _furthest_block(result: EvaluationResult) -> list[str]:
    hidden = result["hidden_states"]
    errors = {
        block["student_block"]: block["relative_error"]
        for block in ([] if hidden is None else hidden["blocks"])
        if math.isfinite(block["relative_error"])
    }
    if not errors:
        return []
    worst = max(errors, key=lambda block: errors[block])
    ending = "" if errors[worst] < 1 else ", more than a constant would have"
    return [f"Block {worst} is furthest from its teacher: a relative error of"
            f" {errors[worst]:.2f} in the chain{ending}."]  # fmt: skip


def tiles(run: Run | None, result: EvaluationResult | None) -> list[tuple[str, str, str]]:
    """The key figures: name, value, and a note."""
    found = []
    if result is not None:
        teacher, student = result["models"][0], result["models"][1]
        ratio = student["size"]["parameters"] / max(1, teacher["size"]["parameters"])
        quality = student["quality"]
        perplexity = tables.format_number(quality["perplexity"], ",.4g")
        of_teacher = tables.format_number(teacher["quality"]["perplexity"], ",.4g")
        agreement = tables.format_number(100 * quality["top1_agreement"], ".1f")
        found += [
            ("size", f"{ratio:.1%}", "of the teacher's parameters"),
            ("perplexity", perplexity, f"the teacher has {of_teacher}"),
            ("KL to teacher", tables.format_number(quality["kl_nats"], ".3f"), "nats per token"),
            ("top-1 agreement", f"{agreement} %", "of all tokens"),
        ]
        if student["speed"] and teacher["speed"]:
            times = number(student["speed"]["forward_tokens_per_second"]) / max(
                1e-9, number(teacher["speed"]["forward_tokens_per_second"])
            )
            found.append(("speed", f"{times:.2f} x", "the teacher's tokens/s"))
    elif run is not None:
        own, theirs = (
            number(group(run.manifest.get(who)).get("parameters")) for who in ("student", "teacher")
        )
        if own > 0 and theirs > 0:
            found.append(("size", f"{own / theirs:.1%}", "of the teacher's parameters"))
    if run is not None:
        planned = number(group(run.manifest.get("planned")).get("seconds"))
        note = f"planned {duration(planned)}" if math.isfinite(planned) else "in all"
        found.append(("training time", duration(seconds_taken(run)), note))
    return found


def recipe_of(settings: dict[str, Any]) -> tuple[Recipe, dict[str, Any]]:
    """The nearest recipe, and the settings that are not its own."""
    different = {
        name: {
            key: settings[key]
            for key, value in {**recipe.options, **recipe.training}.items()
            if key in settings
            and settings[key] not in (value, *(own.get(key) for own in recipe.of_kinds.values()))
        }
        for name, recipe in RECIPES.items()
    }
    nearest = min(different, key=lambda name: len(different[name]))
    return RECIPES[nearest], different[nearest]


def recipe_sentence(settings: dict[str, Any]) -> str:
    """How the settings stand to the nearest recipe."""
    if not settings:
        return "The run wrote down no settings."
    recipe, different = recipe_of(settings)
    if not different:
        return f"The recipe {recipe.name}, as it stands in distillation/recipes/."
    own = ", ".join(f"{key} {shown(value)}" for key, value in different.items())
    return f"Nearest to the recipe {recipe.name}; otherwise than there: {own}."


def hints(run: Run | None, result: EvaluationResult | None) -> dict[str, str]:
    """By what is missing, the command that makes it."""
    own = [*EVALUATE, "--model_path", "MODEL"]
    own_plan = "python -m examples.run_distillation_example --plan"
    watch = ""
    command = "" if result is None else str(result["environment"].get("command") or "")
    if run is not None:
        own = [*own[:-1], str(run.path), *evaluation_flags(_training_settings(run))]
        watch = f"python -m distillation.report --watch {shlex.quote(str(run.path))}"
        started = str(run.manifest.get("command") or "")
        own_plan = f"{started} --plan" if "--output_dir" in started else own_plan
    evaluate = command or shlex.join(own)
    start = "PATH" if run is None else shlex.quote(str(run.path / "start"))
    return {
        "evaluate": shlex.join([*own, "--generate_comparisons"]),
        "generate": evaluate
        if "--generate_comparisons" in evaluate
        else f"{evaluate} --generate_comparisons",
        "baseline": f"{evaluate} --baseline_path {start}",
        "watch": watch,
        "plan": own_plan,
    }


def _training_settings(run: Run) -> dict[str, Any]:
    """What the evaluation takes over from the training."""
    try:
        settings: dict[str, Any] = dict(written_settings(run.path / "config.yaml"))
    except UsageError:  # a run from a notebook has none
        name = str(group(run.manifest.get("teacher")).get("name") or "")
        known = name and teacher_name(run) != "builtin"
        return {"teacher_model_name_or_path": name} if known else {}
    settings["streaming"] = settings.get("streaming") == "true"
    return settings
