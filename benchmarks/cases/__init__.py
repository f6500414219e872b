"""What is measured. Each module has

measurements(quick, folders)            the sets of parameters, each with its systems
ready(params, folders)                  makes what all systems need, in a process of its own
SYSTEMS[name](params, folders)          imports what the system needs and gives the function that is timed
check(system, params, folders, result)  metrics of a result beside time, as numbers
"""

NAMES = ("decode", "preprocess", "encode", "select", "search", "end_to_end", "scaling", "index", "library")
