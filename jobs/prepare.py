"""Prepare data from a submitted job: `ray job submit ... -- python -m jobs.prepare IN OUT`.

The same as `gammaray data prepare`; on the cluster it was submitted to.
"""

import sys

from pipeline.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["data", "prepare"]
    main()
