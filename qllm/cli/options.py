"""What options mean that several commands have."""

SET = "Override a key, e.g. 'sweep.rate=[1,2,4]'"
FORCE = "Replace what --out holds: results of another configuration, or files of yours"
EXPERTS = "plain; packed: as an FP8 or MXFP4 checkpoint has them; or nf4: quantised to four bits"
ANY_SIZE = "Run what is estimated to take more than an hour, or more memory than there is"
