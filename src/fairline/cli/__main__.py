"""``python -m fairline.cli``."""

from fairline.cli import main

main()
