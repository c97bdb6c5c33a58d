"""Evaluate from a submitted job: `ray job submit ... -- python -m jobs.evaluate RUN [a.b=value]`.

The same as `gammaray evaluate`; on the cluster it was submitted to.
"""

import sys

from pipeline.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["evaluate"]
    main()
