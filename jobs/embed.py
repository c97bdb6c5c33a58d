"""Embed data from a submitted job: `ray job submit ... -- python -m jobs.embed RUN IN OUT`.

The same as `gammaray embed`; on the cluster it was submitted to.
"""

import sys

from pipeline.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["embed"]
    main()
