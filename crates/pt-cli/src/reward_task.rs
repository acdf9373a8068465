//! Training of a reward model as a kind of job: its rows, its head, what its scores say of held-out pairs.

use crate::job::Job;
use crate::talk::{self, Refused};
use crate::task::{Checked, CheckedRows, CheckedSet, Findings, MAX_SHARD_BYTES, PROMPT_IS_KNOWN, Policy, Task};
use anyhow::Result;
use pt_model::{CausalLm, Pretrained};
use pt_peft::{Adapter, load_adapter};
use pt_rlhf::{
    Calibration, NUM_BINS, RewardConfig, RewardModel, RewardTraining, ScalarHead, ScoreRecord, ScoredPair,
    check_method, end_at_turn, trunk_of,
};
use pt_tensor::{Tensor, no_grad};
use pt_train::TrainError;
use pt_train::data::{DataConfig, Judgement, PreferenceGroup, Row, preference_preflight, prompt_overlap};
use pt_train::encoder::ModelEncoder;
use pt_train::objective::{Objective, Pass, evaluate};
use pt_train::report::{DataTable, Figure};
use pt_train::run_dir::RunDir;
use pt_train::settings::TrainConfig;
use std::cell::{OnceCell, RefCell};
use std::path::Path;
use std::rc::Rc;

/// Training of a reward model.
#[derive(Default)]
pub(crate) struct RewardTask {
    /// The head that is trained.
    head: OnceCell<ScalarHead>,
    /// The objective's memory of scores.
    record: RefCell<ScoreRecord>,
}

impl Task for RewardTask {
    type Settings = RewardConfig;
    type Example = PreferenceGroup;
    const COMMAND: &'static str = "reward";
    const ROWS: &'static str = "`chosen`, `rejected`, optional `prompt`, `margin`, `weight`; `completions` with \
                                `ranks` or `scores`, optional `prompt`, `weight`";
    const TAKES_LABELS: bool = true;
    const TITLE: &'static str = "Reward model";
    const LOSS_UNIT: &'static str = "nats/prompt";
    const ANSWERS: bool = false;

    fn open(path: &Path) -> Result<Pretrained> {
        Ok(trunk_of(Pretrained::open(path)?)?)
    }

    fn check(
        rows: &[Row],
        eval_rows: &[Row],
        pretrained: &Pretrained,
        encoder: &ModelEncoder<'_>,
        config: &TrainConfig<RewardConfig>,
    ) -> Result<Checked<PreferenceGroup>> {
        config.peft.map_or(Ok(()), check_method)?;
        // A head of another width or of more labels is told before a run stands.
        RewardModel::of_pretrained(pretrained, pt_tensor::Device::Cpu)?;
        let train = checked("training", rows, encoder, &config.data, Some(&config.objective))?;
        let held_out = |rows: &[Row]| checked("held out", rows, encoder, &config.data, None);
        Checked::of_sets(train, eval_rows, held_out, prompt_overlap, PROMPT_IS_KNOWN)
    }

    fn objective(
        &self,
        job: &Job<Self>,
        _run: &RunDir,
        _pretrained: &Pretrained,
        _model: &CausalLm,
        _policy: Policy<'_>,
        _rows: [&mut CheckedRows<PreferenceGroup>; 2],
    ) -> Result<Box<dyn Objective<Example = PreferenceGroup>>> {
        let training = RewardTraining::new(job.config.objective.clone(), self.reward()?)?;
        self.record.replace(training.record());
        Ok(Box::new(training))
    }

    /// An adapter that was trained for something else (answers, say) gets a new head.
    fn load_adapter(&self, folder: &Path, model: &CausalLm) -> Result<Rc<dyn Adapter>> {
        if !RewardModel::is_adapter(folder)? {
            return Ok(load_adapter(folder, model)?);
        }
        let (RewardModel { head, .. }, adapter) = RewardModel::load_adapter(folder, model)?;
        // Once training is done, the head takes the values of the checkpoint that is looked at.
        let own = self.head.get_or_init(|| head.shared());
        no_grad(|| own.weight().shallow_clone().copy_(head.weight()));
        Ok(adapter)
    }

    fn leaves_beside(&self, pretrained: &Pretrained, model: &CausalLm, seed: u64) -> Result<Vec<(String, Tensor)>> {
        let head = match (self.head.get(), RewardModel::of_pretrained(pretrained, model.device())?) {
            (Some(head), _) => head.shared(),
            (None, Some(reward)) => reward.head,
            (None, None) => ScalarHead::new(model.config().hidden_size, seed, model.device())?,
        };
        Ok(self.head.get_or_init(|| head).parameters())
    }

    fn save_adapter(&self, adapter: &dyn Adapter, folder: &Path) -> pt_train::Result<()> {
        Ok(self.reward()?.save_adapter(adapter, folder)?)
    }

    fn save_model(&self, folder: &Path, pretrained: &Pretrained, model: &CausalLm) -> pt_train::Result<()> {
        Ok(self.reward()?.save_model(model, pretrained, folder, MAX_SHARD_BYTES)?)
    }

    fn findings(
        &self,
        job: &Job<Self>,
        objective: &mut dyn Objective<Example = PreferenceGroup>,
        pass: &Pass<'_>,
        eval: &CheckedRows<PreferenceGroup>,
    ) -> Result<Findings> {
        if eval.examples.is_empty() {
            return Ok(Findings::default());
        }
        let scored = || self.record.borrow().held_out(pass.step);
        let pairs = match scored() {
            Some(pairs) => pairs,
            // The last evaluation was of other weights.
            None => {
                let max_tokens = job.config.batch.max_tokens.unwrap_or(4096);
                let mut work = talk::Work::new("held-out scores", eval.examples.len(), "rows");
                evaluate(objective, pass, &eval.examples, max_tokens, &mut |done| work.set(done))?;
                work.finish();
                scored().unwrap_or_default()
            }
        };
        let source_of = |pair: &ScoredPair| job.eval_rows[eval.row_of_example[pair.example]].source.as_str();
        let findings = findings(pass.step, &pairs, &source_of);
        findings.tables.iter().flat_map(|table| &table.sources).for_each(|(source, cells)| {
            eprintln!(
                "held out, {source}: {} pairs, accuracy {} %, calibration error {}",
                cells[0], cells[1], cells[3]
            );
        });
        Ok(findings)
    }
}

impl RewardTask {
    /// The reward model as it stands.
    fn reward(&self) -> pt_train::Result<RewardModel> {
        let head = self.head.get().ok_or_else(|| TrainError::Objective {
            message: "the reward head was asked for before it was made".into(),
            hint: None,
        })?;
        Ok(RewardModel { head: head.shared(), statistics: self.record.borrow().statistics() })
    }
}

/// Rows of one set; those to train on, which come with the settings, are shown.
fn checked(
    name: &str,
    rows: &[Row],
    encoder: &ModelEncoder<'_>,
    data: &DataConfig,
    training: Option<&RewardConfig>,
) -> Result<CheckedSet<PreferenceGroup>> {
    let mut preflight = preference_preflight(rows, encoder, data)?;
    let labelled = |group: &PreferenceGroup| matches!(group.judgement, Judgement::Labels(_));
    if let Some(group) = preflight.groups.iter().position(labelled) {
        return Err(Refused {
            message: format!(
                "{}: holds a single completion with a label, and a reward model takes pairs or ranked lists",
                rows[preflight.row_of_group[group]].origin
            ),
            hint:
                "train on such rows with `pt dpo --set loss_type=kto`, or join those of a prompt to lists with `scores`"
                    .into(),
        }
        .into());
    }
    preflight.groups.iter_mut().for_each(|group| end_at_turn(&mut group.group, encoder));
    if let Some(settings) = training {
        eprintln!("{}", preflight.summary.to_text());
        for example in preflight.examples(rows, encoder, talk::is_terminal()) {
            eprintln!("{example}\n");
        }
        let has_margins = preflight.summary.sources.iter().any(|source| source.margins.is_some());
        if has_margins && !settings.use_margin {
            eprintln!(
                "note: the rows' margins or scores only rank them; --set use_margin=true asks scores to part by them"
            );
        }
    }
    let table = DataTable::of_preferences(name, &preflight.summary);
    Ok((CheckedRows { examples: preflight.groups, row_of_example: preflight.row_of_group }, table))
}

/// A reliability diagram of all pairs, and a line for each source.
fn findings<'a>(step: u64, pairs: &[ScoredPair], source_of: &dyn Fn(&ScoredPair) -> &'a str) -> Findings {
    let mut by_source: Vec<(&str, Vec<f64>)> = Vec::new();
    for pair in pairs {
        let source = source_of(pair);
        match by_source.iter_mut().find(|(known, _)| *known == source) {
            Some((_, differences)) => differences.push(pair.difference),
            None => by_source.push((source, vec![pair.difference])),
        }
    }
    let all: Vec<f64> = pairs.iter().map(|pair| pair.difference).collect();
    let calibration = Calibration::of(&all, NUM_BINS);
    if by_source.len() > 1 {
        by_source.push(("all", all));
    }
    let line = |(source, differences): (&str, Vec<f64>)| {
        let count = differences.len().max(1) as f64;
        let num_right = differences.iter().filter(|difference| **difference > 0.0).count();
        let cells = vec![
            differences.len().to_string(),
            format!("{:.1}", 100.0 * num_right as f64 / count),
            format!("{:.3}", differences.iter().sum::<f64>() / count),
            format!("{:.3}", Calibration::of(&differences, NUM_BINS).expected_error),
        ];
        (source.to_string(), cells)
    };
    let table = DataTable {
        name: format!("by source, step {step}"),
        head: vec!["pairs", "accuracy, %", "mean margin", "calibration error"],
        sources: by_source.into_iter().map(line).collect(),
        notes: vec![format!(
            "expected calibration error {:.3}: how far the share of pairs in which the better scored completion is the \
             better one lies from σ of the difference of scores",
            calibration.expected_error
        )],
        warnings: vec![],
    };
    let observed = calibration.bins.iter().map(|bin| (bin.predicted, bin.observed)).collect();
    let figure = Figure {
        title: "Reliability".into(),
        unit: "share in which the better scored one is the better".into(),
        x: "predicted".into(),
        curves: vec![("observed".into(), observed), ("calibrated".into(), vec![(0.5, 0.5), (1.0, 1.0)])],
    };
    Findings { figures: vec![figure], tables: vec![table] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_told_apart_and_summed() {
        let pair = |example, difference| ScoredPair { example, difference };
        let pairs = [pair(0, 1.0), pair(0, -1.0), pair(1, 2.0), pair(2, 3.0)];
        let source_of = |pair: &ScoredPair| if pair.example == 0 { "human" } else { "judge" };
        let Findings { figures, tables } = findings(7, &pairs, &source_of);
        let shown: Vec<_> =
            tables[0].sources.iter().map(|(name, cells)| format!("{name} {}", cells[..3].join(" "))).collect();
        assert_eq!(shown, ["human 2 50.0 0.000", "judge 2 100.0 2.500", "all 4 75.0 1.250"]);
        assert_eq!(tables[0].name, "by source, step 7");
        assert_eq!(figures[0].curves[0].1.len(), 3);
    }
}
