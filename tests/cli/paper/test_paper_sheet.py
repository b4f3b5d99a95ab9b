"""The sheet of crops."""

from PIL import Image

from giantleap.cli.paper.sheet import CELL_PX, to_cell


def test_cells_of_a_row_show_the_same_part() -> None:
    base = Image.new("L", (128, 128))
    base.paste(255, (48, 48, 80, 80))
    for largest_px, width_px in ((256, 64), (512, 128)):  # 32 px of 128, of which the cell shows all or the inner half
        larger = base.resize((largest_px, largest_px), Image.Resampling.NEAREST)
        cells = [to_cell(image, largest_px) for image in (base, larger)]
        assert cells[0].tobytes() == cells[1].tobytes() and cells[0].size == (CELL_PX,) * 2
        assert cells[0].histogram()[255] == width_px**2
