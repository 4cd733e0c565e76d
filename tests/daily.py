"""Which cases of long sweeps are in the daily run; all others are marked `slow`.

A sweep states one property of many codecs, layers or settings. The daily run keeps cases of every
kind, so that a fault of the property itself is seen; `pytest -m slow` has the rest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest

LARGEST = {"cheng2020-attn", "elic2022-chandelier"}
"""Architectures of 81 and 114 channel groups. In the daily run they have `ALL_ARCHITECTURES` alone,
since smaller ones have the same kinds of layers.
"""

ALL_ARCHITECTURES = {
    "pruning/test_surgery.py::test_bitstreams_decode_to_the_masked_image",
    "pruning/test_surgery.py::test_pruned_is_masked",
}
"""What holds of every architecture, the largest too, each day."""

EVERY = {
    "bench/test_bench.py::test_every_part_says_what_it_measured": 4,
    "channels/test_channels.py::test_a_foreign_codec_is_pruned_rightly_or_pinned": 3,
    "channels/test_known.py::test_a_codec_that_has_changed_is_analysed_anew": 3,
    "channels/test_known.py::test_damaged_groups_are_refused_in_one_line": 3,
    "cli/test_coding_command.py::test_images_of_too_many_pixels_are_refused_before_any_work": 3,
    "cli/test_outputs.py::test_an_input_is_never_replaced": 3,
    "cli/test_outputs.py::test_another_kind_of_file_is_replaced_by_force_alone": 3,
    "cli/test_prune_command.py::test_every_method_without_training_is_named_in_the_help": 2,
    "cli/test_report_command.py::test_no_report_is_written_among_images": 2,
    "cli/test_report_command.py::test_the_files_of_others_stay": 3,
    "codecs/test_calling.py::test_methods_look_at_grey_images": 2,
    "codecs/test_cdf.py::test_streams_are_the_same_with_fast_indexes": 3,
    "codecs/test_context_coding.py::test_bytes_are_those_of_the_loop": 2,
    "codecs/test_context_coding.py::test_files_are_read_with_and_without_numba": 3,
    "codecs/test_context_coding.py::test_other_forms_are_coded_by_the_loop": 3,
    "codecs/test_context_coding.py::test_pruned_codecs_are_coded_by_the_kernel": 3,
    "codecs/test_copying.py::test_what_cannot_be_copied_is_shared_and_nothing_else": 2,
    "codecs/test_evc.py::test_every_part_costs_what_it_does_in_the_paper": 3,
    "codecs/test_evc.py::test_half_of_it_is_the_masked_codec": 2,
    "codecs/test_float64_coding.py::test_methods_on_the_codec_take_part": 3,
    "codecs/test_float64_coding.py::test_other_kernels_decode_the_same_symbols": 2,
    "codecs/test_float64_coding.py::test_what_both_sides_compute_is_in_float64_and_nothing_else": 3,
    "codecs/test_large_strides.py::test_images_of_other_sides_are_refused_by_methods": 2,
    "codecs/test_large_strides.py::test_it_is_pruned_trained_and_evaluated": 2,
    "codecs/test_not_finite.py::test_weights_that_are_not_finite_are_named": 3,
    "codecs/test_own_widths.py::test_the_widths_are_those_of_the_name": 3,
    "codecs/test_state_dicts.py::test_what_is_clear_is_loaded": 3,
    "codecs/test_transposed_bias.py::test_first_and_second_gradients_are_right": 2,
    "evaluation/test_evaluation.py::test_every_architecture_is_evaluated": 3,
    "experiments/test_damaged_runs.py::test_damaged_files_of_a_run_that_goes_on": 4,
    "fuzz/test_fuzz.py::test_a_few_of_each_kind": 2,
    "methods/test_adaptation.py::test_another_process_reads_old_and_new_files": 3,
    "methods/test_adaptation.py::test_files_hold_both_or_the_adaptation_alone": 2,
    "methods/test_adaptation.py::test_macs_of_new_channels_are_what_runs": 3,
    "methods/test_adaptation.py::test_old_files_are_read_bit_for_bit_and_new_ones_too": 3,
    "methods/test_adaptation.py::test_the_source_stays_frozen_in_any_loop": 2,
    "methods/test_adaptation_pruned.py::test_files_are_those_of_an_adaptation": 2,
    "methods/test_adaptation_pruned.py::test_masked_is_pruned_in_both_domains": 3,
    "methods/test_adaptation_pruned.py::test_what_is_left_is_an_adaptation_of_these_widths": 2,
    "methods/test_composition.py::test_every_pair_is_attached_or_refused_as_declared": 3,
    "methods/test_distillation.py::test_the_original_is_the_other_side": 3,
    "methods/test_gating.py::test_calibrating_meets_the_budget_on_the_images_given": 3,
    "methods/test_gating.py::test_calibrating_moves_least_what_matters_most_for_its_macs": 2,
    "methods/test_gating.py::test_gates_see_the_same_energies_when_a_rate_is_folded_in": 2,
    "methods/test_gating.py::test_methods_beside_gates_are_hardened_together": 2,
    "methods/test_gating.py::test_methods_beside_gates_see_what_they_would_without": 3,
    "methods/test_group_lasso.py::test_an_interrupted_run_goes_on_as_it_was": 4,
    "methods/test_group_lasso.py::test_each_limit_has_a_line": 3,
    "methods/test_group_lasso.py::test_so_it_is_in_blocks_of_every_sort": 8,
    "methods/test_group_lasso.py::test_the_cost_follows_a_line": 8,
    "methods/test_group_lasso.py::test_the_cost_follows_a_line_where_weights_grow": 3,
    "methods/test_group_lasso.py::test_the_norm_is_of_what_shrinks": 3,
    "methods/test_layers_called_one_by_one.py::"
    "test_a_modulator_does_what_it_does_where_transforms_are_called": 2,
    "methods/test_left_as_it_was.py::test_attaching_and_preparing_run_a_codec_without_a_trace": 2,
    "methods/test_methods.py::test_a_copy_is_independent": 3,
    "methods/test_methods.py::test_a_state_dict_resumes_identically": 2,
    "methods/test_methods.py::test_attaching_changes_nothing": 2,
    "methods/test_methods.py::test_hardening_at_a_level_gives_a_plain_codec": 3,
    "methods/test_methods.py::test_hardening_gives_a_plain_codec": 2,
    "methods/test_methods.py::test_masks_decay_to_an_exact_target": 3,
    "methods/test_methods.py::test_what_stays_is_attached_again_to_what_is_left": 3,
    "methods/test_methods_on_blocks.py::"
    "test_a_width_of_a_slimmable_codec_is_the_codec_of_that_width": 8,
    "methods/test_methods_on_blocks.py::test_gates_close_what_is_removed": 3,
    "methods/test_methods_on_blocks.py::test_masks_that_have_decayed_are_hardened_exactly": 3,
    "methods/test_modulation.py::test_a_bitstream_says_its_rate": 3,
    "methods/test_modulation.py::test_a_codec_of_its_own_making_is_modulated": 3,
    "methods/test_modulation.py::test_a_modulator_loses_the_channels_that_its_codec_loses": 3,
    "methods/test_modulation.py::test_a_pruned_modulator_codes": 2,
    "methods/test_modulation.py::test_folding_a_rate_is_the_hooks": 3,
    "methods/test_netadapt.py::test_every_layer_kind_is_searched": 3,
    "methods/test_netadapt.py::test_every_limit_holds": 3,
    "methods/test_norms_adapt.py::test_a_pruned_codec_is_counted_saved_and_exported": 2,
    "methods/test_norms_adapt.py::test_masks_half_way_are_folded_exactly": 3,
    "methods/test_other_names.py::test_a_modulator_scales_the_latents_and_nothing_else": 3,
    "methods/test_other_names.py::test_costs_are_told_by_transform": 3,
    "methods/test_other_names.py::test_every_method_goes_on_every_codec": 4,
    "methods/test_other_names.py::test_the_original_decoder_reads_what_a_pruned_encoder_writes": 2,
    "methods/test_own_loop.py::test_a_compiled_codec_computes_at_the_point_that_is_set": 8,
    "methods/test_own_loop.py::test_attaching_leaves_the_modes_of_single_layers": 3,
    "methods/test_own_loop.py::test_compiling_the_codec_in_the_model_is_refused": 4,
    "methods/test_scalable_encoder.py::test_the_original_decodes_what_any_level_wrote": 2,
    "methods/test_side_by_side.py::test_gates_close_where_the_budget_says": 3,
    "methods/test_side_by_side.py::test_gates_decide_alike_once_masked_channels_are_gone": 2,
    "methods/test_slimmable.py::test_each_width_is_a_codec_of_its_own": 2,
    "methods/test_temporal_entropy_model.py::"
    "test_a_width_on_its_own_keeps_the_tables_of_the_file": 2,
    "methods/test_temporal_entropy_model.py::test_an_interrupted_run_resumes_bit_for_bit": 3,
    "methods/test_temporal_entropy_model.py::test_both_sides_keep_the_same_latents": 3,
    "pruning/test_attributes.py::test_a_file_with_numbers_that_fit_nothing_is_refused": 3,
    "pruning/test_attributes.py::test_numbers_that_code_holds_follow_the_width": 6,
    "pruning/test_blocks.py::test_a_block_is_as_free_as_it_can_be": 8,
    "pruning/test_blocks.py::test_norms_that_adapt_leave_all_free": 6,
    "pruning/test_budget.py::test_met_from_below_and_nothing_more_fits": 3,
    "pruning/test_cost.py::test_decreases_are_differences_of_totals": 2,
    "pruning/test_cost.py::test_known_totals_at_768x512": 2,
    "pruning/test_cost.py::test_the_cost_of_keep_lists_is_what_is_counted": 5,
    "pruning/test_designs.py::test_most_of_a_design_can_be_pruned": 3,
    "pruning/test_foreign_codecs.py::test_what_an_autograd_function_runs_is_counted": 2,
    "pruning/test_latency.py::test_one_shot_methods_meet_budgets_of_time_from_below": 6,
    "pruning/test_surgery.py::test_a_codec_starts_anew_as_its_class_makes_it": 3,
    "pruning/test_surgery.py::test_pruned_is_masked": 3,
    "runtime/test_accelerate.py::test_each_codes_what_the_other_reads": 2,
    "runtime/test_accelerate.py::test_what_changes_layers_is_refused": 3,
    "runtime/test_accelerate.py::"
    "test_what_depends_on_the_size_is_refused_or_right_at_every_size": 2,
    "storage/test_checkpoint.py::test_round_trip_is_exact_and_decodes": 3,
    "storage/test_coded_video.py::test_a_shape_may_be_a_dictionary": 2,
    "storage/test_coded_video.py::test_a_video_says_its_rate_and_domain": 2,
    "storage/test_coded_video.py::test_contents_made_on_purpose_end_in_one_line": 3,
    "storage/test_container.py::test_what_is_read_is_what_the_codec_itself_decodes": 2,
    "storage/test_damage.py::test_tables_that_the_coder_cannot_read_are_refused": 3,
    "storage/test_made_again.py::test_a_codec_that_would_load_as_another_function_is_refused": 2,
    "test_golden.py::test_architectures": 2,
    "test_golden.py::test_methods": 2,
    "test_readme.py::test_python_examples_run": 6,
    "training/test_checkpoints.py::test_what_somebody_else_sealed_is_one_line": 3,
    "training/test_frozen_statistics.py::test_adapted_codecs_read_their_old_files": 2,
    "training/test_frozen_statistics.py::test_the_side_that_is_not_trained_stays": 2,
    "training/test_training.py::test_every_architecture_trains_with_masks_on": 3,
    "training/test_training.py::"
    "test_soap_resumes_bit_equal_with_methods_that_change_what_learns": 2,
}
"""Every so many-th case of these tests is in the daily run, from the first."""

SELDOM = {
    "bench/test_coding.py::test_every_part_and_every_codec_is_measured",
    "bench/test_decoding.py::test_images_are_decoded_alike_or_refused_elsewhere",
    "cli/test_application.py::test_module_runs",
    "cli/test_imports.py::test_files_of_the_current_folder_do_not_stand_for_libraries",
    "cli/test_outputs.py::test_a_codec_of_ones_own_class_is_exported_by_its_factory",
    "cli/test_timing_command.py::test_a_file_with_widths_is_profiled_evaluated_and_coded",
    "cli/test_timing_command.py::test_a_report_of_backends_compares_within_families",
    "cli/test_timing_command.py::test_codecs_are_timed_by_several_backends",
    "cli/test_video_commands.py::test_a_clip_is_encoded_and_decoded_in_another_process",
    "cli/test_video_commands.py::test_evaluation_of_every_width_beside_x264",
    "codecs/test_calling.py::test_a_grey_codec_is_trained_and_evaluated",
    "codecs/test_calling.py::test_a_grey_codec_of_other_names_is_exported",
    "codecs/test_context_coding.py::test_weights_that_float32_does_not_hold",
    "codecs/test_copying.py::test_every_use_takes_a_codec_that_keeps_activations",
    "codecs/test_evc.py::test_the_large_codec_shrinks_to_the_small_one",
    "codecs/test_kernel_faults.py::test_every_architecture_trains_at_128_pixels",
    "codecs/test_provenance.py::test_a_pickled_codec_needs_no_nicprune",
    "evaluation/test_evaluate_video.py::test_macs_of_an_accelerated_codec_are_its_own",
    "experiments/test_adaptation_recipe.py::test_a_report_says_what_a_codec_gains_and_forgets",
    "experiments/test_damaged_runs.py::test_a_damaged_codec_is_not_copied_into_a_report",
    "experiments/test_recipe.py::test_a_chain_may_branch",
    "experiments/test_recipe.py::test_a_resumed_run_keeps_the_times_that_its_budget_was_met_by",
    "experiments/test_recipe.py::test_a_small_codec_is_trained_from_scratch_too",
    "experiments/test_recipe.py::test_an_arm_may_be_tuned_longer",
    "experiments/test_recipe.py::test_an_arm_may_have_a_lambda_of_its_own",
    "experiments/test_recipe.py::test_an_arm_may_have_both_phases_of_its_own",
    "experiments/test_recipe.py::test_codecs_that_only_a_factory_makes_are_saved_and_loaded_by_it",
    "experiments/test_recipe.py::test_every_level_of_an_encoder_is_a_curve",
    "experiments/test_recipe.py::test_frames_that_a_recipe_does_not_measure_are_said",
    "experiments/test_recipe.py::test_photographs_that_may_not_be_shown_are_not",
    "experiments/test_recipe.py::test_seeds_draw_different_lots_and_crops",
    "experiments/test_recipe.py::test_train_recipe_chains_qualities",
    "experiments/test_recipe.py::test_what_teaches_goes_on_in_fine_tuning",
    "experiments/test_resolve.py::test_what_is_accepted_can_begin_and_what_is_refused_is_one_line",
    "methods/test_adaptation.py::test_what_cannot_grow_is_refused_and_adapted_otherwise",
    "methods/test_adaptation_pruned.py::test_a_recipe_adapts_and_prunes",
    "methods/test_adaptation_pruned.py::test_the_cost_of_any_numbers_of_new_channels_is_what_runs",
    "methods/test_distillation.py::test_the_best_split_is_measured",
    "methods/test_gating.py::test_gates_in_the_hyper_transforms_are_removed_exactly_beside_gdn",
    "methods/test_layers_called_one_by_one.py::test_others_work_or_say_why_not",
    "methods/test_methods.py::test_attaching_with_latents_open_changes_nothing",
    "methods/test_methods.py::test_methods_of_other_packages_come_in_by_an_entry_point",
    "methods/test_netadapt.py::test_dead_channels_go_first_and_cost_nothing",
    "methods/test_netadapt.py::test_the_loss_is_lower_than_by_squared_gradients",
    "methods/test_scalable_encoder.py::test_evaluation_is_told_the_level",
    "methods/test_slimmable.py::test_a_slimmable_codec_is_saved_and_coded_at_any_width",
    "methods/test_temporal_entropy_model.py::"
    "test_each_width_is_a_codec_of_its_own_that_writes_the_same_bytes",
    "methods/test_temporal_entropy_model.py::test_it_goes_beside_widths_that_are_trained_already",
    "methods/test_temporal_entropy_model.py::test_the_narrower_the_width_the_less_memory_it_takes",
    "methods/test_temporal_entropy_model.py::test_the_papers_network_has_the_papers_cost",
    "methods/test_temporal_entropy_model.py::test_the_temporal_model_is_pruned_alone",
    "methods/test_temporal_entropy_model.py::test_training_makes_a_clip_cheaper",
    "pruning/test_foreign_codecs.py::test_few_trials_find_the_widths_that_code_holds",
    "pruning/test_random_codecs.py::test_random_codecs",
    "report/test_folder.py::"
    "test_report_is_the_same_from_its_own_records_and_names_no_place_on_disk",
    "report/test_folder.py::test_report_without_pruned_codecs_leaves_no_stale_plot",
    "report/test_gates_and_rates.py::test_report_folder_with_gates_and_rates",
    "report/test_gates_and_rates.py::test_widths_and_their_schedule_are_on_the_page",
    "report/test_plots.py::test_many_arms_are_told_apart_and_leave_the_panels_their_room",
    "report/test_video.py::test_damaged_records_end_in_one_line",
    "report/test_video.py::test_it_is_made_again_from_its_records",
    "runtime/test_measure_latency.py::test_a_damaged_table_is_measured_again",
    "runtime/test_measure_latency.py::test_a_pruned_codec_is_measured_beside_its_original",
    "runtime/test_streams.py::test_a_process_codes_by_backends",
    "storage/test_coded_video.py::"
    "test_a_fault_in_any_byte_of_any_record_ends_in_one_line_after_the_frames_before_it",
    "storage/test_container.py::test_evaluation_counts_the_strings_that_are_written",
    "storage/test_container.py::test_images_made_on_purpose_end_in_one_line_or_a_picture",
    "storage/test_container.py::test_the_fingerprint_stays_with_the_weights",
    "storage/test_export.py::test_a_wrong_file_is_noticed",
}
"""Single tests that take seconds and show what shorter ones show in part; in the slow run alone."""


def mark(items: Sequence[pytest.Item], tests: Path, *, whole: bool) -> None:
    """Mark what is not in the daily run.

    Args:
        items: the tests that were collected.
        tests: their folder.
        whole: whether all tests of each file were collected.

    Raises:
        pytest.UsageError: a test that is named here does not exist.
    """
    seen: defaultdict[str, int] = defaultdict(int)
    files = set()
    for item in items:
        file = item.path.relative_to(tests).as_posix()
        files.add(file)
        name = f"{file}::{getattr(item, 'originalname', item.name)}"
        number = seen[name]
        if item.get_closest_marker("slow") is not None:
            continue
        seen[name] += 1
        cases = getattr(item, "callspec", None)
        large = cases is not None and LARGEST & {*map(str, cases.params.values())}
        large = large and name not in ALL_ARCHITECTURES
        if large or name in SELDOM or number % EVERY.get(name, 1):
            item.add_marker(pytest.mark.slow)
    gone = [
        n
        for n in (*EVERY, *SELDOM, *ALL_ARCHITECTURES)
        if n.partition("::")[0] in files and n not in seen
    ]
    if whole and gone:
        raise pytest.UsageError(f"tests/daily.py names what is no test: {', '.join(gone)}")
