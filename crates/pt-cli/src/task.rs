//! What the kinds of training differ in, for the one job that runs them.

use crate::job::{Job, save_model};
use crate::talk;
use anyhow::Result;
use pt_model::{CausalLm, Pretrained, Sites};
use pt_peft::{Adapter, load_adapter};
use pt_tensor::Tensor;
use pt_train::data::{Preflight, PromptGroup, Row, overlap, preflight};
use pt_train::encoder::ModelEncoder;
use pt_train::objective::{Example, Objective, Pass};
use pt_train::report::{DataTable, Figure};
use pt_train::run_dir::RunDir;
use pt_train::settings::{ObjectiveConfig, TrainConfig};
use pt_train::sft::{Sft, SftConfig};
use std::path::Path;
use std::rc::Rc;

/// What is trained: what is switched on at the model's sites, and the tensors that learn, by name.
pub(crate) type Policy<'a> = (&'a Rc<dyn Sites>, &'a [(String, Tensor)]);

/// One kind of training.
pub(crate) trait Task: Sized {
    /// The objective's part of the settings.
    type Settings: ObjectiveConfig;
    /// What it is trained on.
    type Example: Example + 'static;
    /// The command that runs it, as in `pt sft`.
    const COMMAND: &'static str;
    /// The forms of its rows, for `--help`.
    const ROWS: &'static str;
    /// Whether a field `label` of its rows is a judgement.
    const TAKES_LABELS: bool;
    /// Title of the report.
    const TITLE: &'static str;
    /// What its loss counts.
    const LOSS_UNIT: &'static str;
    /// Whether what it trains answers prompts, so that there is something to chat with.
    const ANSWERS: bool = true;

    /// Opens the model that it trains on.
    fn open(path: &Path) -> Result<Pretrained> {
        Ok(Pretrained::open(path)?)
    }

    /// Tokenizes and checks training and held-out rows, and shows what will be trained.
    fn check(
        rows: &[Row],
        eval_rows: &[Row],
        pretrained: &Pretrained,
        encoder: &ModelEncoder<'_>,
        config: &TrainConfig<Self::Settings>,
    ) -> Result<Checked<Self::Example>>;

    /// Settles what the settings name by relative paths, so that a run can be resumed from another folder.
    fn settle(_config: &mut TrainConfig<Self::Settings>) {}

    /// Loads what the objective needs and what may be refused, before the run's folder stands.
    fn prepare(&self, _: &Job<Self>, _: &Pretrained, _: &CausalLm, _: Policy<'_>) -> Result<()> {
        Ok(())
    }

    /// What is optimized; it may complete the training and the held-out rows.
    fn objective(
        &self,
        job: &Job<Self>,
        run: &RunDir,
        pretrained: &Pretrained,
        model: &CausalLm,
        policy: Policy<'_>,
        rows: [&mut CheckedRows<Self::Example>; 2],
    ) -> Result<Box<dyn Objective<Example = Self::Example>>>;

    /// The adapter in a folder, to train on or to measure.
    fn load_adapter(&self, folder: &Path, model: &CausalLm) -> Result<Rc<dyn Adapter>> {
        Ok(load_adapter(folder, model)?)
    }

    /// What is trained beside the adapter or the model: leaves by name.
    fn leaves_beside(&self, _: &Pretrained, _: &CausalLm, _seed: u64) -> Result<Vec<(String, Tensor)>> {
        Ok(vec![])
    }

    /// Writes the adapter, with what is trained beside it, into a folder of a checkpoint.
    fn save_adapter(&self, adapter: &dyn Adapter, folder: &Path) -> pt_train::Result<()> {
        Ok(adapter.save(folder)?)
    }

    /// Writes the model, with what is trained beside it, into a folder of a checkpoint.
    fn save_model(&self, folder: &Path, pretrained: &Pretrained, model: &CausalLm) -> pt_train::Result<()> {
        save_model(folder, pretrained, model, MAX_SHARD_BYTES)
    }

    /// What the report tells of the held-out rows beside the metrics; `pass` runs the weights of its step.
    fn findings(
        &self,
        _job: &Job<Self>,
        _objective: &mut dyn Objective<Example = Self::Example>,
        _pass: &Pass<'_>,
        _eval: &CheckedRows<Self::Example>,
    ) -> Result<Findings> {
        Ok(Findings::default())
    }
}

/// Largest size of one weight file of a checkpoint.
pub(crate) const MAX_SHARD_BYTES: usize = 5_000_000_000;

/// What was found on held-out rows.
#[derive(Default)]
pub(crate) struct Findings {
    pub(crate) figures: Vec<Figure>,
    pub(crate) tables: Vec<DataTable>,
}

/// Rows that passed the pre-flight.
pub(crate) struct CheckedRows<E> {
    pub(crate) examples: Vec<E>,
    /// For each example, its row in the input.
    pub(crate) row_of_example: Vec<usize>,
}

/// Training and held-out rows that did.
pub(crate) struct Checked<E> {
    pub(crate) train: CheckedRows<E>,
    /// Empty without held-out data.
    pub(crate) eval: CheckedRows<E>,
    /// What was found in them, for the report.
    pub(crate) tables: Vec<DataTable>,
}

/// One set of rows that passed the pre-flight, and what was found in it.
pub(crate) type CheckedSet<E> = (CheckedRows<E>, DataTable);

impl<E> Checked<E> {
    /// Training rows and, where there are any, held-out ones; `shared` counts those of them that are `known` to training.
    pub(crate) fn of_sets(
        (train, table): CheckedSet<E>,
        eval_rows: &[Row],
        held_out: impl FnOnce(&[Row]) -> Result<CheckedSet<E>>,
        shared: impl FnOnce(&[E], &[E]) -> usize,
        known: &str,
    ) -> Result<Self> {
        let mut checked =
            Self { train, eval: CheckedRows { examples: vec![], row_of_example: vec![] }, tables: vec![table] };
        if !eval_rows.is_empty() {
            let (eval, table) = held_out(eval_rows)?;
            let count = shared(&checked.train.examples, &eval.examples);
            if count > 0 {
                eprintln!("warning: {count} held-out rows {known} in the training data too");
            }
            checked.eval = eval;
            checked.tables.push(table);
        }
        Ok(checked)
    }
}

/// What is said of held-out rows whose prompt is trained on.
pub(crate) const PROMPT_IS_KNOWN: &str = "have a prompt that stands";

/// Supervised fine-tuning.
pub(crate) struct SftTask;

impl Task for SftTask {
    type Settings = Sft;
    type Example = PromptGroup;
    const COMMAND: &'static str = "sft";
    const ROWS: &'static str = "`messages`; `prompt`, `completion`; `instruction`, `input`, `output`; or `text`";
    const TAKES_LABELS: bool = false;
    const TITLE: &'static str = "Supervised fine-tuning";
    const LOSS_UNIT: &'static str = "nats/token";

    fn check(
        rows: &[Row],
        eval_rows: &[Row],
        _pretrained: &Pretrained,
        encoder: &ModelEncoder<'_>,
        config: &SftConfig,
    ) -> Result<Checked<PromptGroup>> {
        let set = |name: &str, Preflight { groups, row_of_group, summary }: Preflight| {
            let rows = CheckedRows { examples: groups, row_of_example: row_of_group };
            (rows, DataTable::of_rows(name, &summary))
        };
        let train = preflight(rows, encoder, &config.data)?;
        eprintln!("{}", train.summary.to_text());
        for example in train.examples(rows, encoder, talk::is_terminal()) {
            eprintln!("{example}\n");
        }
        let held_out = |rows: &[Row]| Ok(set("held out", preflight(rows, encoder, &config.data)?));
        Checked::of_sets(set("training", train), eval_rows, held_out, overlap, "stand")
    }

    fn objective(
        &self,
        job: &Job<Self>,
        _run: &RunDir,
        _pretrained: &Pretrained,
        _model: &CausalLm,
        _policy: Policy<'_>,
        _rows: [&mut CheckedRows<PromptGroup>; 2],
    ) -> Result<Box<dyn Objective<Example = PromptGroup>>> {
        Ok(Box::new(job.config.objective.clone()))
    }
}
