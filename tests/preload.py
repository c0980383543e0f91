"""Imported once, before commands are forked: the script of all pages, which takes two seconds to bundle."""

import subprocess
import sys

from fairline.report import page

_CODE = "import sys; from fairline.report.page import javascript; sys.stdout.write(javascript())"
# In a process of its own: threads of the bundler would be missing in what is forked.
_BUNDLED = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, check=True).stdout

page.javascript = lambda: _BUNDLED
