"""`python -m data_prep build | merge | verify | stat`, with the exit codes of `infoxlm prep`."""

import sys

from data_prep.cli import app
from infoxlm_ds.config import UserError
from infoxlm_ds.trouble import complain

if __name__ == "__main__":
    try:
        app(prog_name="python -m data_prep")
    except UserError as error:
        complain(str(error))
        sys.exit(2)
