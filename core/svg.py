"""Pictures as SVG, so that nobody needs a library for them."""

from __future__ import annotations

from xml.etree import ElementTree as Xml

COLORS = ("#4269d0", "#efb118", "#3ca951", "#ff725c", "#a463f2", "#6cc5b0", "#9c6b4e", "#97bbf5")
"""To tell things apart by."""


class Picture:
    """White, of so many pixels, with x to the right and y down. Later things lie on earlier ones."""

    def __init__(self, width: float, height: float) -> None:
        attributes = {"viewBox": f"0 0 {width:g} {height:g}", "font-family": "sans-serif", "font-size": "12"}
        self._root = Xml.Element("svg", {"xmlns": "http://www.w3.org/2000/svg"} | attributes)
        self.add("rect", width=width, height=height, fill="white")

    def add(self, tag: str, **attributes: object) -> Xml.Element:
        """Numbers to a tenth of a pixel, and - for _ in names."""
        written = {
            name.replace("_", "-"): f"{value:.1f}" if isinstance(value, float) else str(value)
            for name, value in attributes.items()
        }
        return Xml.SubElement(self._root, tag, written)

    def text(self, x: float, y: float, text: str, anchor: str = "start", **attributes: object) -> None:
        self.add("text", x=x, y=y, text_anchor=anchor, **attributes).text = text

    def line(self, x1: float, y1: float, x2: float, y2: float, **attributes: object) -> None:
        self.add("line", **{"x1": x1, "y1": y1, "x2": x2, "y2": y2, "stroke": "black"} | attributes)

    def __str__(self) -> str:
        """The text of the file."""
        return Xml.tostring(self._root, encoding="unicode") + "\n"
