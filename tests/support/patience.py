"""How much longer than on a quiet machine a harness waits before it calls something late."""

import os

PATIENCE = float(os.environ.get("PATIENCE", "1"))
