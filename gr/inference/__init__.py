"""Recommendations from a finished run: load it, ask it, show what it says.

::

    from gr.inference import load_run, recommend

    run = load_run("runs/planted")
    for row in recommend(run, user="42", k=5):
        print(row.rank, row.title, row.score)
"""

from gr.inference.load import Loaded, load_run
from gr.inference.recommend import Recommendations, recommend

__all__ = ["Loaded", "Recommendations", "load_run", "recommend"]
