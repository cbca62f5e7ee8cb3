"""Formulas as MathML, which browsers show without a script."""

import html
import re

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.S)


def to_mathml(content: str) -> str:
    """Returns HTML in which arithmatex's spans and divs of TeX are MathML."""

    def replace(match):
        tex = html.unescape(match[2]).strip()
        display = "block" if match[1] == "div" else "inline"
        formula = convert(tex[2:-2].strip(), display=display)  # without \( \) or \[ \]
        return f'<{match[1]} class="formula">{formula}</{match[1]}>'

    return FORMULA.sub(replace, content)


def on_page_content(content, page, config, files):
    return to_mathml(content)
