//! Laws of runs of PPO, GRPO and RLOO.

use crate::toy::{Deaf, Killer, Played, Recorder, play};
use pt_rlhf::{
    Algorithm, Baseline, CriticConfig, CriticKind, GrpoConfig, ImportanceLevel, PpoConfig, RolloutConfig, SCORES,
    ScorePlacement,
};
use pt_train::schedule::ScheduleKind;
use pt_train::settings::TrainConfig;
use pt_train::train::Ending;
use std::sync::atomic::AtomicBool;

/// Share of the response's tokens that are 77: a whole response of it is the optimum, 1.
fn counting(response: &[i64]) -> f64 {
    response.iter().filter(|&&id| id == 77).count() as f64 / response.len() as f64
}

/// One token decides: an arm of a bandit pays 1, another one a quarter.
fn bandit(response: &[i64]) -> f64 {
    match response[0] {
        30 => 1.0,
        31 => 0.25,
        _ => 0.0,
    }
}

fn settings<A: Algorithm>(objective: A, steps: u64, seed: u64, learning_rate: f64) -> TrainConfig<A> {
    let mut config = TrainConfig { objective, max_steps: Some(steps), seed, learning_rate, ..TrainConfig::default() };
    config.schedule.kind = ScheduleKind::Constant;
    config.schedule.warmup_steps = Some(0);
    config.adamw.weight_decay = 0.0;
    config.lora = Default::default();
    config
}

/// Cool: the tiny model's logits are bounded by its final norm, and at 1 its best policy says the best word in 94 of 100.
fn rollout(max_new_tokens: usize) -> RolloutConfig {
    RolloutConfig { max_new_tokens, temperature: 0.6, ..RolloutConfig::default() }
}

/// Mean score of the last iterations, at the temperature of the settings.
fn reached<A: Algorithm>(config: &TrainConfig<A>, task: fn(&[i64]) -> f64) -> f64 {
    let folder = tempfile::tempdir().unwrap();
    let mut recorder = Recorder::default();
    play(config, task, (8, 0), &folder.path().join("run"), &AtomicBool::new(false), &mut recorder).unwrap();
    let last: Vec<f64> = recorder.iterations.iter().rev().take(3).map(|it| it.value(SCORES).unwrap()).collect();
    last.iter().sum::<f64>() / last.len() as f64
}

fn ppo(max_new_tokens: usize, num_samples: usize) -> PpoConfig {
    PpoConfig { rollout: rollout(max_new_tokens), num_samples, kl_coef: 0.0, ..PpoConfig::default() }
}

fn grpo(max_new_tokens: usize) -> GrpoConfig {
    GrpoConfig { rollout: rollout(max_new_tokens), ..GrpoConfig::default() }
}

#[test]
fn ppo_solves_a_bandit_over_three_seeds() {
    for seed in 0..3 {
        let mut objective = ppo(1, 16);
        // One token is found early or not at all.
        objective.rollout.temperature = 1.0;
        let score = reached(&settings(objective, 100, seed, 5e-3), bandit);
        assert!(score >= 0.95, "seed {seed}: {score}");
    }
}

#[test]
fn ppo_counts_tokens_over_three_seeds() {
    for seed in 0..3 {
        // A group that always says the same learns nothing more.
        let objective = PpoConfig { entropy_coef: 0.01, ..ppo(4, 8) };
        let score = reached(&settings(objective, 100, seed, 5e-3), counting);
        assert!(score >= 0.95, "seed {seed}: {score}");
    }
}

#[test]
fn grpo_solves_a_bandit_over_three_seeds() {
    for seed in 0..3 {
        // A group that agrees on the lesser arm has no spread to learn from: more samples, and slower, than PPO takes.
        let mut objective = GrpoConfig { num_samples: 32, ..grpo(1) };
        objective.rollout.temperature = 1.0;
        let score = reached(&settings(objective, 150, seed, 2e-3), bandit);
        assert!(score >= 0.95, "seed {seed}: {score}");
    }
}

#[test]
fn grpo_counts_tokens_over_three_seeds() {
    for seed in 0..3 {
        let score = reached(&settings(grpo(4), 80, seed, 5e-3), counting);
        assert!(score >= 0.95, "seed {seed}: {score}");
    }
}

#[test]
fn rloo_and_a_value_head_on_the_actor_learn_too() {
    let rloo = GrpoConfig { baseline: Baseline::LeaveOneOut, importance: ImportanceLevel::Sum, ..grpo(4) };
    let score = reached(&settings(rloo, 60, 0, 5e-3), counting);
    assert!(score >= 0.8, "RLOO: {score}");
    let critic = CriticConfig { kind: CriticKind::ActorHead, ..CriticConfig::default() };
    let mut objective = PpoConfig { critic, ..ppo(4, 8) };
    objective.rollout.temperature = 1.0;
    let score = reached(&settings(objective, 60, 0, 5e-3), counting);
    assert!(score >= 0.8, "value head on the actor: {score}");
}

/// A run with everything that a checkpoint has to hold.
fn rich(steps: u64) -> TrainConfig<PpoConfig> {
    let objective = PpoConfig {
        kl_coef: 0.1,
        kl_control: pt_rlhf::KlControl { kind: pt_rlhf::KlControlKind::Adaptive, target: 0.5, horizon: 50.0 },
        normalize_scores: true,
        num_epochs: 2,
        num_minibatches: 2,
        score_placement: ScorePlacement::AfterEnd,
        ..ppo(5, 2)
    };
    let mut config = settings(objective, steps, 3, 1e-3);
    config.batch.batch_size = 3;
    config.save_every = 2;
    config.eval_every = 2;
    config
}

/// Metrics of a run without what a clock says.
fn metrics(folder: &std::path::Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    let line = |line: &str| {
        let mut value: serde_json::Value = serde_json::from_str(line).unwrap();
        let object = value.as_object_mut().unwrap();
        object
            .retain(|name, _| !["seconds/", "tokens_per_second", "memory_bytes"].iter().any(|it| name.starts_with(it)));
        value
    };
    text.lines().map(line).collect()
}

#[test]
fn a_run_that_is_killed_at_any_moment_and_resumed_equals_one_that_was_not() {
    let folder = tempfile::tempdir().unwrap();
    let (config, stop) = (rich(5), AtomicBool::new(false));
    let whole = folder.path().join("whole");
    let mut recorder = Recorder::default();
    let expected = play(&config, counting, (7, 2), &whole, &stop, &mut recorder).unwrap();
    // Twenty moments, evenly over all that is heard: sampling, scoring, the roles' passes, updates, ends of iterations
    // and evaluations.
    for moment in 0..20 {
        let path = folder.path().join(format!("killed-{moment}"));
        let mut killer = Killer { left: (moment * recorder.count + recorder.count / 2) / 20 };
        // In a thread of its own: unwinding leaves the thread's gradient mode as it was in the middle of things.
        let died = std::thread::scope(|scope| {
            scope.spawn(|| play(&config, counting, (7, 2), &path, &stop, &mut killer).map(drop)).join()
        });
        assert!(died.is_err(), "moment {moment} comes before the end");
        let resumed = play(&config, counting, (7, 2), &path, &stop, &mut Deaf).unwrap();
        assert_eq!(resumed.values, expected.values, "moment {moment}");
        assert_eq!(metrics(&path), metrics(&whole), "moment {moment}");
    }
}

#[test]
fn a_run_that_is_stopped_while_it_samples_goes_on_where_it_was() {
    struct Stopper<'a>(&'a AtomicBool, usize);
    impl pt_rlhf::RlObserver for Stopper<'_> {
        fn on_phase(&mut self, _step: u64, _phase: pt_rlhf::Phase, _done: usize, _total: usize) {
            self.1 += 1;
            self.0.store(self.1 >= 40, std::sync::atomic::Ordering::Relaxed);
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let (config, stop) = (rich(4), AtomicBool::new(false));
    let run = |name: &str, stop: &AtomicBool, observer: &mut dyn pt_rlhf::RlObserver| -> Played {
        play(&config, counting, (7, 0), &folder.path().join(name), stop, observer).unwrap()
    };
    let expected = run("whole", &stop, &mut Deaf);
    let stopped = run("stopped", &stop, &mut Stopper(&stop, 0));
    assert_eq!(stopped.outcome.ending, Ending::Interrupted);
    assert!(stopped.outcome.steps < 4);
    let resumed = run("stopped", &AtomicBool::new(false), &mut Deaf);
    assert_eq!((resumed.outcome.ending, resumed.outcome.steps), (Ending::Done, 4));
    assert_eq!(resumed.values, expected.values);
}

#[test]
fn an_update_does_not_depend_on_how_it_is_cut() {
    let run = |max_tokens: Option<usize>| {
        let folder = tempfile::tempdir().unwrap();
        let mut config = rich(1);
        config.batch.max_tokens = max_tokens;
        play(&config, counting, (7, 0), &folder.path().join("run"), &AtomicBool::new(false), &mut Deaf).unwrap().values
    };
    for ((name, one), (_, other)) in run(None).iter().zip(&run(Some(1))) {
        let apart = one.iter().zip(other).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(apart < 2e-5, "{name}: {apart}");
    }
}

#[test]
fn the_first_update_of_an_iteration_begins_at_ratio_1_and_kl_0() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = rich(3);
    (config.objective.num_epochs, config.objective.num_minibatches) = (1, 1);
    let mut recorder = Recorder::default();
    play(&config, counting, (7, 0), &folder.path().join("run"), &AtomicBool::new(false), &mut recorder).unwrap();
    let value = |name: &str| recorder.iterations[0].value(name).unwrap();
    assert!((value("val/ratio") - 1.0).abs() < 1e-4, "{}", value("val/ratio"));
    assert!(value("objective/kl").abs() < 1e-4, "{}", value("objective/kl"));
    // At first the adapter does nothing; sampling has to agree with training once it does.
    for iteration in &recorder.iterations {
        assert!(iteration.value("policy/sampling_gap").unwrap() < 1e-4, "{iteration:?}");
        assert!((iteration.value("val/ratio").unwrap() - 1.0).abs() < 1e-4, "{iteration:?}");
    }
    assert_eq!(value("policy/clipfrac_avg"), 0.0);
    assert!(value("completions/end_rate") <= 1.0);
}

#[test]
fn a_policy_that_trains_otherwise_than_it_samples_is_told_with_the_layer() {
    let mut config = settings(grpo(4), 3, 0, 5e-3);
    // Dropout in the adapter; before the first update its B is 0, and nothing shows.
    config.lora.lora_dropout = 0.5;
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let played = play(&config, counting, (8, 0), &run, &AtomicBool::new(false), &mut Deaf);
    let error = played.map(|_| ()).expect_err("the gap is found").to_string();
    assert!(error.contains("when it was sampled") && error.contains("part behind layer 0"), "{error}");
}
