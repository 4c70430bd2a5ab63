"""A picture of the page in the browser, which runs in another terminal.

    python -m space.app --checkpoint=out/chat/best.pt
    python -m tools.screenshot --question="Who wrote 'Macbeth'?" --out=page.png

Needs Chromium and playwright (pip install playwright). Uses the system's
Chromium, or else the one that `python -m playwright install chromium` installs.
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # for `python tools/screenshot.py`

from configurator import BadInput, configure

url = "http://127.0.0.1:7860"  # address of the page
question = ""  # ask this first, and wait for the answer (chat only); empty: show the page as it opens
out = "page.png"  # the picture to write


def main():
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        raise BadInput("screenshots need playwright: pip install playwright") from None
    with sync_playwright() as playwright:
        try:
            chromium = shutil.which("chromium") or shutil.which("google-chrome")
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 900, "height": 640})
            page.goto(url)
            textbox = page.get_by_role("textbox").first
            textbox.wait_for()
            if question:
                textbox.fill(question)
                textbox.press("Enter")
                page.locator("[data-testid=bot]").wait_for()
                page.locator(".stop-button").wait_for(state="hidden")  # shown while an answer is written
            page.screenshot(path=out)
        except Error as error:
            problem = str(error).splitlines()[0]
            raise BadInput(f"{url}: {problem}: is the page running there, and Chromium installed?") from None
    print(f"wrote {out}")


if __name__ == "__main__":
    configure(globals())
    main()
