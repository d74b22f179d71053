"""A sheet of pictures with their prompts below, all made by `ferry generate` from models/shapes.

  contact_sheet.py FERRY OUTPUT.png
"""
import os
import subprocess
import sys
import tempfile
import textwrap

from PIL import Image, ImageDraw

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PROMPTS = [
    "a large red circle on a white background", "a blue star in the top left on a beige background",
    "a large green ring on a black background", "a yellow heart on the right on a navy background",
    "a small purple square at the bottom", "a large orange triangle on a gray background",
    "a cyan cross in the top right on a white background", "a pink diamond on a black background",
    "a white star at the bottom on a navy background", "a black ring on the left on a beige background",
    "a large purple heart on a white background", "a red square in the bottom right on a gray background",
]
COLUMNS, SIDE, TEXT = 6, 128, 44

ferry, output = sys.argv[1:]
rows = -(-len(PROMPTS) // COLUMNS)
sheet = Image.new("RGB", (COLUMNS * (SIDE + 8) + 8, rows * (SIDE + TEXT) + 8), "#f4f4f4")
draw = ImageDraw.Draw(sheet)
with tempfile.TemporaryDirectory() as work:
    for index, prompt in enumerate(PROMPTS):
        path = os.path.join(work, "picture.png")
        subprocess.run([ferry, "--quiet", "generate", "--model", os.path.join(ROOT, "models/shapes"), "--prompt", prompt,
                        "--negative-prompt", "", "--true-cfg-scale", "2", "--steps", "8", "--max-sequence-length", "24",
                        "--seed", "1", "--weights-memory", "2MiB", "--output", path], check=True)
        x, y = 8 + index % COLUMNS * (SIDE + 8), 8 + index // COLUMNS * (SIDE + TEXT)
        sheet.paste(Image.open(path).resize((SIDE, SIDE), Image.LANCZOS), (x, y))
        for line, text in enumerate(textwrap.wrap(prompt, 22)[:3]):
            draw.text((x, y + SIDE + 2 + 12 * line), text, fill="#333333")
sheet.save(output, optimize=True)
