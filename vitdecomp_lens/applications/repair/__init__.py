"""Repair: find the components that carry what a model should not go by, and take them away.

The paper (arXiv 2406.01583, "spurious correlations", Table 3) ranks components by their score for spurious features
minus that for core features, sets the first ten to their mean, and looks at the worst group of Waterbirds. Here the
number of components is chosen on validation data, means come from training data, and what is reported comes from
neither::

    ranking = repair.rank(scores, "spurious", "core")
    choice = repair.choose_total(model, validation, ranking, labels, groups=groups, classifier=c, reference=training)
    repair.measure_total(model, test, choice.components, test_labels, groups=test_groups, classifier=c,
                         reference=training)
    state = repair.export(model, components=choice.components, reference=training)

The repair of typographic attacks is the same with other features (written words against shapes) and other groups
(images with writing, images without, or none).
"""

from vitdecomp_lens.applications.repair.choosing import (
    Choice,
    Repaired,
    choose_direct,
    choose_total,
    measure_direct,
    measure_total,
)
from vitdecomp_lens.applications.repair.comparing import balanced_probe, project_out, span_that_predicts
from vitdecomp_lens.applications.repair.exporting import export
from vitdecomp_lens.applications.repair.groups import GroupAccuracy, Groups
from vitdecomp_lens.applications.repair.ranking import Ranking, rank, rank_read

__all__ = [
    "Choice",
    "GroupAccuracy",
    "Groups",
    "Ranking",
    "Repaired",
    "balanced_probe",
    "choose_direct",
    "choose_total",
    "export",
    "measure_direct",
    "measure_total",
    "project_out",
    "rank",
    "rank_read",
    "span_that_predicts",
]
