"""Pictures of hidden states while a run goes on."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from cleangpt.run_directory import write_atomically
from cleangpt.runtime.module_state import preserved_modes
from distillation.batch import Batch
from distillation.stages import BlockStage


@torch.no_grad()
def draw_block(stage: BlockStage, epoch: int, batch: Batch, folder: Path | None) -> None:
    """Draw the states that a block's loss compares, of a batch's first row.

    Args:
        stage: The block.
        epoch: After which epoch, for the picture's name.
        batch: Any batch; all processes of a run take part in its states.
        folder: Where the picture goes; None in the processes that do not draw.
    """
    model = stage.activations.student.model
    with preserved_modes(model):
        model.eval()
        student, teacher = stage.states(batch)
    if folder is not None:
        name = f"hidden_states_block_{stage.block}_epoch_{epoch}.png"
        save_hidden_state_picture(folder / name, student[0], teacher[0])


def save_hidden_state_picture(
    path: Path, student: Float[Tensor, "seq dim"], teacher: Float[Tensor, "seq dim"]
) -> None:
    """Draw student and teacher states of one sequence side by side, on one colour scale.

    Args:
        path: The PNG file; its folder is made.
        student: The student's states, after the stitch.
        teacher: The teacher's states.
    """
    # Loading a plotting library costs half a second, which runs without pictures need not pay.
    from matplotlib.figure import Figure

    states = [t.detach().float().cpu().numpy() for t in (student, teacher)]
    limit = float(abs(states[1]).max()) or 1.0
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axes, values, title in zip(
        figure.subplots(1, 2), states, ("Student hidden state", "Teacher hidden state"), strict=True
    ):
        image = axes.imshow(
            values, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest"
        )
        axes.set(title=title, xlabel="channel", ylabel="position")
    figure.colorbar(image, ax=figure.axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
