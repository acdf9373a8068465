//! Talk on stderr: errors with their hints, progress on a terminal and plain lines elsewhere.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pt_model::ModelError;
use pt_peft::PeftError;
use pt_tensor::TensorError;
use pt_train::TrainError;
use std::io::IsTerminal;
use std::process::ExitCode;

/// A mistake in how the command was called: exit code 2 instead of 1.
#[derive(Debug)]
pub(crate) struct Usage(pub(crate) String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Prints the chain of causes and what to do; returns the exit code.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    // A reader that closed the pipe (`pt generate | head`) has what it wanted.
    if error
        .chain()
        .any(|e| e.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe))
    {
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
        e.is::<Usage>() || matches!(e.downcast_ref(), Some(TrainError::UnknownKey { .. } | TrainError::Config { .. }))
    });
    ExitCode::from(if is_usage { 2 } else { 1 })
}

fn hint(cause: &(dyn std::error::Error + 'static)) -> Option<String> {
    if let Some(error) = cause.downcast_ref::<TrainError>() {
        return error.hint();
    }
    if cause.is::<Usage>() {
        return Some("`pt help COMMAND` shows the options; `pt sft --print-config` the fields and their values".into());
    }
    if let Some(error) = cause.downcast_ref::<PeftError>() {
        return error.hint();
    }
    if let Some(error) = cause.downcast_ref::<ModelError>() {
        return error.hint();
    }
    cause.downcast_ref::<TensorError>().and_then(TensorError::hint)
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
