"""Fine-tune as a submitted job: `ray job submit ... -- python -m jobs.finetune CONFIG [a.b=c]`.

The same as `gammaray finetune`; on the cluster it was submitted to.
"""

import sys

from pipeline.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["finetune"]
    main()
