"""Two processes, of which the second stands still while the first waits for it."""

import os
import time

from kepo.parallel import processes, together

with processes("cpu", patience=float(os.environ["PATIENCE"])):
    together("here")
    if os.environ["RANK"] == "1":
        time.sleep(1000)
    together("there")
