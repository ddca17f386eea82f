"""The command ``geofm``.

    main        the app, the commands that run a recipe, and the one boundary for errors
    options     arguments and options that several commands share
    audit       commands that read the store: list, runs, show, path, diff, trace, why, licences,
                verify; their work is in artifacts, lineage and verify
    export      ``geofm export``
    sources     ``geofm sources``
    server      ``geofm up``, ``down`` and ``env``
    calibrate   ``geofm calibrate``
    dry_run     the option ``--dry-run``
    console     progress on stderr, results on stdout

``geofm --help`` takes less than a second because the modules that declare commands import nothing
heavy at their top: a command imports its work when it runs. A test guards this.
"""
