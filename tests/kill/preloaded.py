"""What the process that is forked imports and does once."""

import gc
import threading

from kill.runs import warm_up
from tqdm import tqdm

# Its default lock is shared across forks: a child killed while it draws would stop the bars of all later ones.
tqdm.set_lock(threading.RLock())
warm_up()
gc.freeze()  # children collect garbage several times, but not what is here
