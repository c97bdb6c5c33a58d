"""Sweep as a submitted job: `ray job submit ... -- python -m jobs.sweep CONFIG --over a.b=c,d`.

The same as `gammaray sweep`; on the cluster it was submitted to.
"""

import sys

from pipeline.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["sweep"]
    main()
