"""Files of a store and of this machine.

address    addresses of folders and stores: ``local_folder``, ``store_address``
atomic     write files and folders in one step: ``atomic_file``, ``atomic_folder``
export     copy an artifact elsewhere, verified: ``exported_copy``
lock       locks on files: ``lock_file``
process    identity and life of processes, cores, peak memory
reach      read files, with retries for object stores: ``reach``, ``read_file``, ``OutOfReach``
s3         ranges and uploads of S3 objects
"""
