//! Results on stdout; talk on stderr: errors with their hints, progress on a terminal and plain lines elsewhere.

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pt_dpo::DpoError;
use pt_fetch::FetchError;
use pt_model::ModelError;
use pt_peft::PeftError;
use pt_rlhf::RlhfError;
use pt_tensor::TensorError;
use pt_train::TrainError;
use std::fmt::Display;
use std::io::{ErrorKind, IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// A mistake in how the command was called: exit code 2 instead of 1.
#[derive(Debug)]
pub(crate) struct Usage(pub(crate) String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Such a mistake with a remedy of its own.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Misused {
    pub(crate) message: String,
    pub(crate) hint: String,
}

/// What a command refuses for a reason of its own, with what to do about it: exit code 1.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Refused {
    pub(crate) message: String,
    pub(crate) hint: String,
}

/// The reader of stdout has gone, as in `pt models | head -1`: it has what it wanted.
#[derive(Debug, thiserror::Error)]
#[error("stdout was closed")]
struct StdoutClosed;

/// Writes to stdout at once; the one way to do it, since `print!` panics when the reader has gone.
pub(crate) fn put(bytes: &[u8]) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(StdoutClosed.into()),
        written => written.context("cannot write to stdout"),
    }
}

/// A line on stdout.
pub(crate) fn say(line: impl Display) -> Result<()> {
    put(format!("{line}\n").as_bytes())
}

/// Prints the chain of causes and what to do; returns the exit code.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    if error.is::<StdoutClosed>() {
        return ExitCode::SUCCESS;
    }
    let mut said: Vec<String> = Vec::new();
    for cause in error.chain() {
        let text = cause.to_string();
        // Transparent wrappers repeat what they wrap.
        if !said.iter().any(|s| s.contains(&text)) {
            said.push(text);
        }
    }
    eprintln!("error: {}", said.join(": "));
    if let Some(hint) = error.chain().find_map(hint) {
        eprintln!("  hint: {hint}");
    }
    let is_usage = error.chain().any(|e| {
        e.is::<Usage>()
            || e.is::<Misused>()
            || matches!(e.downcast_ref(), Some(TrainError::UnknownKey { .. } | TrainError::Config { .. }))
    });
    ExitCode::from(if is_usage { 2 } else { 1 })
}

fn hint(cause: &(dyn std::error::Error + 'static)) -> Option<String> {
    if let Some(error) = cause.downcast_ref::<TrainError>() {
        return error.hint();
    }
    if cause.is::<Usage>() {
        return Some("`pt help COMMAND` shows the options; `--print-config` of a command that trains the fields and their values".into());
    }
    if let Some(misused) = cause.downcast_ref::<Misused>() {
        return Some(misused.hint.clone());
    }
    if let Some(refused) = cause.downcast_ref::<Refused>() {
        return Some(refused.hint.clone());
    }
    if let Some(error) = cause.downcast_ref::<FetchError>() {
        return Some(error.hint());
    }
    if let Some(error) = cause.downcast_ref::<DpoError>() {
        return error.hint();
    }
    if let Some(error) = cause.downcast_ref::<RlhfError>() {
        return error.hint();
    }
    if let Some(error) = cause.downcast_ref::<PeftError>() {
        return error.hint();
    }
    if let Some(error) = cause.downcast_ref::<ModelError>() {
        return error.hint();
    }
    cause.downcast_ref::<TensorError>().and_then(TensorError::hint)
}

/// Progress of one piece of work: a bar on a terminal; elsewhere its name at the start and a line every ten seconds.
pub(crate) struct Work {
    bar: ProgressBar,
    what: String,
    note: String,
    last_line: Instant,
}

impl Work {
    /// Begins `what`, which consists of `total` of `unit`.
    pub(crate) fn new(what: &str, total: usize, unit: &str) -> Self {
        let bar = bar(total as u64, unit);
        if is_terminal() {
            bar.set_message(what.to_string());
            bar.enable_steady_tick(Duration::from_secs(1));
        } else if total > 1 {
            eprintln!("{what}: {total} {unit}");
        }
        Self { bar, what: what.to_string(), note: String::new(), last_line: Instant::now() }
    }

    /// `done` of the total are done.
    pub(crate) fn set(&mut self, done: usize) {
        self.bar.set_position(done as u64);
        self.tell();
    }

    /// One more is done.
    pub(crate) fn advance(&mut self) {
        self.bar.inc(1);
        self.tell();
    }

    /// What else there is to say about the work at this moment.
    pub(crate) fn note(&mut self, note: String) {
        self.bar.set_message(format!("{}  {note}", self.what));
        self.note = note;
        self.tell();
    }

    fn tell(&mut self) {
        if !is_terminal() && self.last_line.elapsed() >= Duration::from_secs(10) {
            self.last_line = Instant::now();
            let total = self.bar.length().unwrap_or(0);
            eprintln!("{}", format!("{}: {}/{total}  {}", self.what, self.bar.position(), self.note).trim_end());
        }
    }

    /// Takes the bar off the screen.
    pub(crate) fn finish(self) {
        self.bar.finish_and_clear();
    }
}

/// A bar on a terminal; nothing drawn elsewhere, where callers print plain lines.
pub(crate) fn bar(total: u64, unit: &str) -> ProgressBar {
    let target = if is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(Some(total), target);
    let template = format!("{{bar:32}} {{pos}}/{{len}} {unit}  {{msg}}  {{elapsed}} elapsed, {{eta}} left");
    if let Ok(style) = ProgressStyle::with_template(&template) {
        bar.set_style(style);
    }
    bar
}

/// Whether a person watches stderr.
pub(crate) fn is_terminal() -> bool {
    std::io::stderr().is_terminal()
}
