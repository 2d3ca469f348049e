"""Text, HTML and plots of results."""

from __future__ import annotations

from attnopt.base.display import shown_by

shown_by("attnopt.compiler.head_results:HeadImportance", "text", "attnopt.render.score_tables:importance_text")
shown_by("attnopt.compiler.head_results:HeadProfile", "text", "attnopt.render.score_tables:profile_text")
shown_by("attnopt.compiler.head_results:HeadSet", "text", "attnopt.render.score_tables:set_text")
shown_by("attnopt.patterns.algebra:Pattern", "html", "attnopt.render.page:pattern_fragment")
shown_by("attnopt.report.atlas:Atlas", "html", "attnopt.render.atlas_page:atlas_frame")
shown_by("attnopt.report.atlas:Atlas", "page", "attnopt.render.atlas_page:atlas_page")
shown_by("attnopt.report.atlas:Atlas", "text", "attnopt.render.atlas_table:atlas_text")
shown_by("attnopt.report.advice:Advice", "text", "attnopt.render.tables:advice_text")
shown_by("attnopt.report.head_effects:HeadEffects", "text", "attnopt.render.score_tables:effects_text")
shown_by("attnopt.report.head_search:HeadSearch", "text", "attnopt.render.score_tables:search_text")
shown_by("attnopt.report.audit:Audit", "text", "attnopt.render.audit:audit_text")
shown_by("attnopt.report.attribution:Attribution", "text", "attnopt.render.head_tables:attribution_text")
shown_by("attnopt.report.collected:Collected", "text", "attnopt.render.head_tables:collected_text")
shown_by("attnopt.report.inspection:Inspection", "html", "attnopt.render.page:inspection_fragment")
shown_by("attnopt.report.inspection:Inspection", "text", "attnopt.render.tables:inspection_text")
shown_by("attnopt.report.policy_search:SearchReport", "html", "attnopt.render.policy_search:search_frame")
shown_by("attnopt.report.policy_search:SearchReport", "page", "attnopt.render.policy_search:search_page")
shown_by("attnopt.report.policy_search:SearchReport", "text", "attnopt.render.policy_search:search_text")
shown_by("attnopt.report.path_gains:PathGains", "text", "attnopt.render.path_gain_table:path_gains_text")
shown_by("attnopt.report.report:Report", "html", "attnopt.render.page:report_frame")
shown_by("attnopt.report.report:Report", "page", "attnopt.render.page:report_page")
