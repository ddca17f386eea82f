"""Stage `report`: one self-contained HTML page per run.

Files, from the outside in:
    report               the stage: from all artifacts of a run to `report.html` and PNG figures
    page                 the page: its sections in order, its headline, its HTML
    record_sections      settings, lineage and licences, quarantine
    data_sections        map, drops, chips, duplicates, distributions, feature space
    curation_sections    thresholds, survival by stratum, quality of the selection, evaluation sets
    model_sections       training, scores, cost
    report_data          the tables of the artifacts, joined once for all sections
    blocks               parts of a section: note, figure, table, gallery, facts
    plots, maps, pictures, lineage_diagram      figures
    templates/           layout and style of the page

To change a table or a text, open the ``*_sections`` file of its section.

For others: ``pictures.side_by_side``, which shows chips beside each other.
"""
