"""A stand-in for `ray start --block` as a pod's first process: writes down each signal, leaves after a while.

`stand_in.py SECONDS ...`: ends with 1, as Ray does, so many seconds after the first SIGTERM.
"""

import json
import os
import signal
import sys
import time

signals: list[float] = []
signal.signal(signal.SIGTERM, lambda *_: signals.append(time.monotonic()))
print("WORDS " + json.dumps([os.getpid(), *sys.argv[2:]]), flush=True)
while not signals or time.monotonic() < signals[0] + float(sys.argv[1]):
    time.sleep(0.05)
print(f"SIGNALS {len(signals)}", flush=True)
sys.exit(1)
