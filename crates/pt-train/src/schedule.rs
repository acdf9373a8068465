//! Learning rate schedules, equal to transformers' `get_*_schedule` functions.

use std::f64::consts::PI;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Result, TrainError};

/// Shape of the learning rate over a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// Warm-up, then flat.
    Constant,
    /// Warm-up, then a straight line to the minimum.
    Linear,
    /// Warm-up, then half a cosine to the minimum.
    #[default]
    Cosine,
    /// Warm-up, stable, then half a cosine to the minimum over the last part of the run.
    Wsd,
}

/// Schedule of the learning rate. The part of a training configuration named `schedule`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ScheduleConfig {
    /// `constant`, `linear`, `cosine` or `wsd`.
    pub kind: ScheduleKind,
    /// Warm-up in steps; when absent, `warmup_ratio` of all steps.
    pub warmup_steps: Option<usize>,
    /// Warm-up as a part of all steps, rounded up.
    pub warmup_ratio: f64,
    /// Learning rate at the end as a part of the highest.
    pub min_lr_ratio: f64,
    /// Decay of `wsd` as a part of all steps, rounded up.
    pub decay_ratio: f64,
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self { kind: ScheduleKind::Cosine, warmup_steps: None, warmup_ratio: 0.03, min_lr_ratio: 0.0, decay_ratio: 0.2 }
    }
}

impl ScheduleConfig {
    /// The schedule of a run of `total_steps` optimizer steps.
    ///
    /// # Errors
    /// [`TrainError::Config`] naming every ratio outside 0..=1.
    pub fn build(&self, total_steps: usize) -> Result<Schedule> {
        let ratios = [
            ("warmup_ratio", self.warmup_ratio),
            ("min_lr_ratio", self.min_lr_ratio),
            ("decay_ratio", self.decay_ratio),
        ];
        let bad: Vec<String> = ratios
            .iter()
            .filter(|(_, ratio)| !(0.0..=1.0).contains(ratio))
            .map(|(name, ratio)| format!("{name} is {ratio}"))
            .collect();
        if !bad.is_empty() {
            return Err(TrainError::Config {
                place: "schedule".into(),
                message: format!("{}, expected 0 to 1", bad.join("; ")),
            });
        }
        let part = |ratio: f64| (total_steps as f64 * ratio).ceil() as usize;
        let warmup_steps = self.warmup_steps.unwrap_or_else(|| part(self.warmup_ratio));
        let decay_steps = part(self.decay_ratio).min(total_steps.saturating_sub(warmup_steps));
        Ok(Schedule { kind: self.kind, warmup_steps, decay_steps, total_steps, min_lr_ratio: self.min_lr_ratio })
    }
}

/// A schedule with its lengths fixed; a pure function of the step, so resuming needs no state.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// Shape.
    pub kind: ScheduleKind,
    /// Steps of warm-up.
    pub warmup_steps: usize,
    /// Steps of decay, for [`ScheduleKind::Wsd`].
    pub decay_steps: usize,
    /// Steps of the run.
    pub total_steps: usize,
    /// Learning rate at the end as a part of the highest.
    pub min_lr_ratio: f64,
}

impl Schedule {
    /// Factor on the highest learning rate for the step that comes after `steps_done` optimizer steps, in 0..=1.
    ///
    /// As in transformers, the first step of a warm-up has factor 0 (for `wsd`: the minimum), and `constant`
    /// knows no minimum. Past the last step the factor stays at its end value.
    pub fn factor(&self, steps_done: usize) -> f64 {
        let ramp = steps_done as f64 / self.warmup_steps.max(1) as f64;
        let scaled = |factor: f64| (factor * (1.0 - self.min_lr_ratio) + self.min_lr_ratio).clamp(0.0, 1.0);
        let half_cosine = |progress: f64| 0.5 * (1.0 + (PI * progress.min(1.0)).cos());
        if steps_done < self.warmup_steps {
            return if self.kind == ScheduleKind::Wsd { scaled(ramp) } else { ramp };
        }
        let decay = (self.total_steps.saturating_sub(self.warmup_steps)).max(1) as f64;
        let progress = (steps_done - self.warmup_steps) as f64 / decay;
        match self.kind {
            ScheduleKind::Constant => 1.0,
            ScheduleKind::Linear => scaled((1.0 - progress).max(0.0)),
            ScheduleKind::Cosine => scaled(half_cosine(progress)),
            ScheduleKind::Wsd => {
                let stable_end = self.total_steps.saturating_sub(self.decay_steps).max(self.warmup_steps);
                if steps_done < stable_end {
                    return 1.0;
                }
                scaled(half_cosine((steps_done - stable_end) as f64 / self.decay_steps.max(1) as f64))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(kind: ScheduleKind, min_lr_ratio: f64, expected: &[f64]) {
        let schedule = Schedule { kind, warmup_steps: 4, decay_steps: 5, total_steps: 20, min_lr_ratio };
        for (step, expected) in expected.iter().enumerate() {
            let found = schedule.factor(step * 3);
            assert!((found - expected).abs() < 1e-9, "{kind:?} at step {}: {found}, expected {expected}", step * 3);
        }
    }

    #[test]
    fn factors_equal_those_of_transformers() {
        // transformers 5.17.0 at steps 0, 3, 6, .. 21 of 20, warm-up 4: `get_constant_schedule_with_warmup`,
        // `get_linear_..`, `get_cosine_..`, `get_cosine_with_min_lr_.. (min_lr_rate 0.1)`, `get_wsd_schedule`
        // (decay 5), the last with min_lr_ratio 0.1. Past the end their cosine rises again; ours stays down.
        check(ScheduleKind::Constant, 0.0, &[0.0, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]);
        check(ScheduleKind::Linear, 0.0, &[0.0, 0.75, 0.875, 0.6875, 0.5, 0.3125, 0.125, 0.0]);
        check(
            ScheduleKind::Cosine,
            0.0,
            &[0.0, 0.75, 0.961939766256, 0.77778511651, 0.5, 0.22221488349, 0.038060233744],
        );
        check(
            ScheduleKind::Cosine,
            0.1,
            &[0.0, 0.75, 0.96574578963, 0.800006604859, 0.55, 0.299993395141, 0.13425421037],
        );
        check(ScheduleKind::Wsd, 0.0, &[0.0, 0.75, 1.0, 1.0, 1.0, 1.0, 0.345491502813, 0.0]);
        check(ScheduleKind::Wsd, 0.1, &[0.1, 0.775, 1.0, 1.0, 1.0, 1.0, 0.410942352531, 0.1]);
    }

    #[test]
    fn ratios_become_steps_and_bad_ones_are_named() {
        let schedule =
            ScheduleConfig { kind: ScheduleKind::Wsd, ..ScheduleConfig::default() }.build(101).expect("good");
        assert_eq!((schedule.warmup_steps, schedule.decay_steps), (4, 21));
        let error = ScheduleConfig { min_lr_ratio: 2.0, warmup_ratio: f64::NAN, ..ScheduleConfig::default() }
            .build(10)
            .expect_err("bad");
        assert_eq!(error.to_string(), "schedule: warmup_ratio is NaN; min_lr_ratio is 2, expected 0 to 1");
    }

    proptest! {
        #[test]
        fn factors_stay_within_bounds_and_only_fall_after_warm_up(
            kind in prop::sample::select(vec![ScheduleKind::Constant, ScheduleKind::Linear, ScheduleKind::Cosine, ScheduleKind::Wsd]),
            warmup_steps in 0usize..30, total_steps in 0usize..100, decay_steps in 0usize..100, min_lr_ratio in 0.0f64..1.0,
        ) {
            let schedule = Schedule { kind, warmup_steps, decay_steps, total_steps, min_lr_ratio };
            for step in 0..120 {
                let factor = schedule.factor(step);
                prop_assert!((0.0..=1.0).contains(&factor));
                prop_assert!(step < warmup_steps || factor >= min_lr_ratio);
                prop_assert!(step < warmup_steps || schedule.factor(step + 1) <= factor + 1e-12);
            }
        }
    }
}
