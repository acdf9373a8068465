//! Preference training as a kind of job: its rows, its reference, its first look at both.

use crate::checkpoints::adapter_folder;
use crate::job::Job;
use crate::open::{ModelArgs, no_tokenizer};
use crate::talk::{self, Refused};
use crate::task::{Checked, CheckedRows, Policy, Task};
use anyhow::{Context, Result};
use pt_dpo::{
    Dpo, DpoConfig, DpoExample, LossConfig, PolicyCopy, Reference, load_reference, precompute, save_reference,
};
use pt_model::{Bare, CausalLm, Pretrained, RunOptions, Sites};
use pt_peft::load_adapter;
use pt_train::data::{DataConfig, Judgement, PreferenceGroup, Row, preference_preflight, prompt_overlap};
use pt_train::encoder::ModelEncoder;
use pt_train::objective::{Objective, Pass, evaluate};
use pt_train::report::DataTable;
use pt_train::run_dir::RunDir;
use pt_train::settings::TrainConfig;
use std::rc::Rc;

/// Where a run keeps the reference's log-probs.
const REFERENCE: &str = "reference_logps.safetensors";
/// Tokens a micro-batch of the reference's pass, which holds no graph.
const REFERENCE_TOKENS: usize = 4096;

/// Preference training.
pub(crate) struct DpoTask;

impl Task for DpoTask {
    type Settings = DpoConfig;
    type Example = DpoExample;
    const COMMAND: &'static str = "dpo";
    const ROWS: &'static str = "`chosen`, `rejected`, optional `prompt`, `margin`, `weight`; `completions` with `ranks` \
                                or `scores`, optional `prompt`, `weight`; for kto `prompt`, `completion`, `label`";
    const TAKES_LABELS: bool = true;
    const TITLE: &'static str = "Preference training";
    const LOSS_UNIT: &'static str = "nats/pair";

    fn check(
        rows: &[Row],
        eval_rows: &[Row],
        pretrained: &Pretrained,
        encoder: &ModelEncoder<'_>,
        config: &TrainConfig<DpoConfig>,
    ) -> Result<Checked<DpoExample>> {
        let settings = &config.objective.reference;
        // Before a run stands or anything is loaded.
        settings.model.as_deref().map_or(Ok(()), |name| find_reference(name, pretrained).map(drop))?;
        settings.adapter.as_deref().map_or(Ok(()), |folder| adapter_folder(folder).map(drop))?;
        let loss = &config.objective.loss;
        let (train, table) = checked("training", rows, encoder, &config.data, loss, true)?;
        let mut tables = vec![table];
        let mut eval = CheckedRows { examples: vec![], row_of_example: vec![] };
        if !eval_rows.is_empty() {
            let (checked, table) = checked("held out", eval_rows, encoder, &config.data, loss, false)?;
            let shared = prompt_overlap(&train.examples, &checked.examples);
            if shared > 0 {
                eprintln!("warning: {shared} held-out rows have a prompt that stands in the training data too");
            }
            (eval, tables) = (checked, [tables, vec![table]].concat());
        }
        Ok(Checked { train, eval, tables })
    }

    fn objective(
        &self,
        job: &Job<Self>,
        run: &RunDir,
        pretrained: &Pretrained,
        model: &CausalLm,
        policy: Policy<'_>,
        [train, eval]: [&mut CheckedRows<DpoExample>; 2],
    ) -> Result<Box<dyn Objective<Example = DpoExample>>> {
        let settings = &job.config.objective;
        if !settings.loss.needs_reference() {
            return Ok(Box::new(Dpo::new(settings.loss.clone(), Reference::Absent)?));
        }
        let mut reference = reference(job, pretrained, model, policy)?;
        if settings.reference.is_precomputed() {
            let path = run.root().join(REFERENCE);
            let sets = [&mut train.examples[..], &mut eval.examples[..]];
            if path.exists() {
                load_reference(&path, sets)?;
                check_reference(&reference, model, policy.0, &train.examples)
                    .with_context(|| path.display().to_string())?;
            } else {
                for (what, examples) in ["training", "held-out"].into_iter().zip(sets) {
                    let mut work = talk::Work::new(&format!("reference on the {what} rows"), examples.len(), "rows");
                    precompute(&reference, model, policy.0, examples, REFERENCE_TOKENS, &mut |done| work.set(done))?;
                    work.finish();
                }
                save_reference(&path, [&train.examples, &eval.examples])?;
            }
            for (what, rows) in [("training", &train.examples), ("held-out", &eval.examples)] {
                if let Some(accuracy) = reference_accuracy(rows) {
                    eprintln!(
                        "the reference finds the chosen completion the more probable one in {:.1} % of the {what} pairs",
                        accuracy * 100.0
                    );
                }
            }
            reference = Reference::Precomputed;
        }
        Ok(Box::new(Dpo::new(settings.loss.clone(), reference)?))
    }
}

/// The reference as the settings name it.
fn reference(
    job: &Job<DpoTask>,
    pretrained: &Pretrained,
    model: &CausalLm,
    (sites, trained): Policy<'_>,
) -> Result<Reference> {
    let settings = &job.config.objective.reference;
    let adapter = |model: &CausalLm| -> Result<Rc<dyn Sites>> {
        match &settings.adapter {
            Some(folder) => Ok(load_adapter(&adapter_folder(folder)?, model)?),
            None => Ok(Rc::new(Bare)),
        }
    };
    if let Some(name) = &settings.model {
        let other = CausalLm::load(&find_reference(name, pretrained)?, job.device, job.kind)?;
        let sites = adapter(&other)?;
        return Ok(Reference::Model(Box::new(other), sites));
    }
    if settings.adapter.is_some() {
        return Ok(Reference::Sites(adapter(model)?));
    }
    let is_new_adapter = job.config.peft.is_some() && job.adapter.is_none();
    Ok(match settings.sync_every {
        // What is about to be trained is the reference itself; nothing has moved yet.
        0 if settings.is_precomputed() && !is_new_adapter => Reference::Sites(sites.clone()),
        0 if is_new_adapter => Reference::Sites(Rc::new(Bare)),
        every => Reference::Copy(PolicyCopy::new(trained, every, settings.sync_mixup)),
    })
}

/// Rows of one set, as the losses take them.
fn checked(
    name: &str,
    rows: &[Row],
    encoder: &ModelEncoder<'_>,
    data: &DataConfig,
    loss: &LossConfig,
    is_shown: bool,
) -> Result<(CheckedRows<DpoExample>, DataTable)> {
    let preflight = preference_preflight(rows, encoder, data)?;
    if is_shown {
        eprintln!("{}", preflight.summary.to_text());
        for example in preflight.examples(rows, encoder, talk::is_terminal()) {
            eprintln!("{example}\n");
        }
    }
    let is_unpaired = |group: &PreferenceGroup| matches!(group.judgement, Judgement::Labels(_));
    let misfit = preflight.groups.iter().position(|group| is_unpaired(group) != loss.is_unpaired());
    if let Some(group) = misfit {
        let origin = &rows[preflight.row_of_group[group]].origin;
        let (has, takes) = match loss.is_unpaired() {
            true => ("a pair or a ranked list", "single completions with a `label`"),
            false => ("a single completion with a label", "pairs or ranked lists"),
        };
        let loss = loss.loss_type[0].name();
        return Err(Refused {
            message: format!("{origin}: holds {has}, and `{loss}` takes {takes}"),
            hint: "choose the loss by --set loss_type=..: kto and apo_zero_unpaired take labels, the others pairs"
                .into(),
        }
        .into());
    }
    let table = DataTable::of_preferences(name, &preflight.summary);
    let examples = DpoExample::from_groups(preflight.groups, loss);
    Ok((CheckedRows { examples, row_of_example: preflight.row_of_group }, table))
}

/// Share of pairs whose chosen completion is the more probable one under the reference; `None` without pairs.
fn reference_accuracy(examples: &[DpoExample]) -> Option<f64> {
    let (mut right, mut count) = (0, 0);
    for example in examples {
        let kept = example.reference.as_ref()?;
        let mut left = &kept.completions[..];
        let logps: Vec<f32> = (example.preference.group.label_counts())
            .map(|count| {
                let (own, rest) = left.split_at(count);
                left = rest;
                own.iter().sum()
            })
            .collect();
        let pairs = example.preference.pairs();
        right += pairs.iter().filter(|pair| logps[pair.chosen] > logps[pair.rejected]).count();
        count += pairs.len();
    }
    (count > 0).then(|| right as f64 / count as f64)
}

/// That kept log-probs are this reference's: the first rows are computed again.
fn check_reference(
    reference: &Reference,
    model: &CausalLm,
    sites: &Rc<dyn Sites>,
    examples: &[DpoExample],
) -> Result<()> {
    let mut again: Vec<DpoExample> = examples.iter().take(2).cloned().collect();
    precompute(reference, model, sites, &mut again, REFERENCE_TOKENS, &mut |_| ())?;
    let logprobs = |examples: &[DpoExample]| -> Vec<f32> {
        examples.iter().filter_map(|row| row.reference.as_ref()).flat_map(|kept| kept.completions.clone()).collect()
    };
    let (kept, found) = (logprobs(&examples[..again.len()]), logprobs(&again));
    let apart = kept.iter().zip(&found).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    // bf16 rounds differently with the rows that a batch holds.
    if apart > 0.25 {
        return Err(Refused {
            message: format!("the reference gives other log-probs now than when they were kept: {apart:.3} nats apart"),
            hint: "resume with the reference that the run began with, or delete the file to compute them again".into(),
        }
        .into());
    }
    Ok(())
}

/// Another model as the reference: it has to read the policy's tokens.
fn find_reference(name: &str, policy: &Pretrained) -> Result<Pretrained> {
    let flags = ModelArgs { model: name.into(), adapter: None, device: String::new(), dtype: String::new() };
    let pretrained = Pretrained::open(flags.path()?)?;
    let words = |pretrained: &Pretrained| {
        let ids =
            pretrained.tokenizer.as_ref().and_then(|tokenizer| tokenizer.encode("The quick brown fox, 2 + 2.").ok());
        (pretrained.config.vocab_size, ids)
    };
    let (own, other) = (words(policy), words(&pretrained));
    if own != other {
        let what = if own.0 == other.0 {
            "reads texts as other tokens".into()
        } else {
            format!("has {} tokens, the model {}", other.0, own.0)
        };
        return Err(Refused {
            message: format!("reference.model {name}: {what}"),
            hint: "the reference has to share the model's vocabulary: take the model that it was trained from".into(),
        }
        .into());
    }
    Ok(pretrained)
}

/// Share of other rows' pairs that the trained policy tells apart, held to the model without its adapter.
pub(crate) fn accuracy_on(
    job: &Job<DpoTask>,
    pretrained: &Pretrained,
    model: &CausalLm,
    sites: &Rc<dyn Sites>,
    rows: &[Row],
) -> Result<f64> {
    let encoder = ModelEncoder::new(pretrained).ok_or_else(|| no_tokenizer(pretrained))?;
    let loss = &job.config.objective.loss;
    let (mut checked, _) = checked("test", rows, &encoder, &job.config.data, loss, false)?;
    let bare = Reference::Sites(Rc::new(Bare));
    let mut work = talk::Work::new("test rows", 2 * checked.examples.len(), "passes");
    let count = checked.examples.len();
    precompute(&bare, model, sites, &mut checked.examples, REFERENCE_TOKENS, &mut |done| work.set(done))?;
    let pass = Pass { step: 0, model, sites, options: RunOptions::default() };
    let mut objective = Dpo::new(loss.clone(), Reference::Precomputed)?;
    let mut watch = |done| work.set(count + done);
    let evaluation = evaluate(&mut objective, &pass, &checked.examples, REFERENCE_TOKENS, &mut watch)?;
    work.finish();
    evaluation.value(pt_dpo::ACCURACY).context("the test rows hold no pair")
}
