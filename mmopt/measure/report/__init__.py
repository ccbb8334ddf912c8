"""Stored results as an HTML page, a Markdown summary and JUnit XML: `mmopt bench report`.

`build` reads files and writes the outputs. `wording` has what all of them say, `markup` the page's
style and parts, `charts` its drawings; `page`, `markdown` and `junit` each make one output.
"""
