//! `pt chat`

use super::generate::Sampling;
use crate::open::ModelArgs;
use anyhow::{Context, Result};
use pt_model::generate;
use pt_train::data::{Encode, Message};
use std::io::{BufRead, IsTerminal, Write};
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// System message at the start of the conversation.
    #[arg(long)]
    system: Option<String>,
    #[command(flatten)]
    sampling: Sampling,
}

pub(crate) fn run(args: Args) -> Result<ExitCode> {
    let opened = args.model.open()?;
    let encoder = opened.encoder()?;
    anyhow::ensure!(encoder.has_template(), "the model carries no chat template; use `pt generate`");
    let config = args.sampling.config(encoder.stop_ids(), false);
    let system = || args.system.iter().map(|text| Message::new("system", text.as_str())).collect::<Vec<_>>();
    let mut messages = system();
    let is_terminal = std::io::stdin().is_terminal();
    if is_terminal {
        eprintln!("/new starts again, /quit or Ctrl-D ends.");
    }
    let mut input = std::io::stdin().lock();
    loop {
        if is_terminal {
            eprint!("> ");
            std::io::stderr().flush()?;
        }
        let mut line = String::new();
        if input.read_line(&mut line)? == 0 || line.trim() == "/quit" {
            return Ok(ExitCode::SUCCESS);
        }
        match line.trim() {
            "" => continue,
            "/new" => {
                messages = system();
                continue;
            }
            text => messages.push(Message::new("user", text)),
        }
        let text = encoder.render(&messages, None, true).map_err(anyhow::Error::msg).context("the chat template")?;
        let prompt = encoder.encode(&text).map_err(anyhow::Error::msg)?;
        let mut ids: Vec<i64> = Vec::new();
        let mut shown = 0;
        let mut stdout = std::io::stdout();
        let show = |ids: &[i64], shown: &mut usize, out: &mut std::io::Stdout| -> bool {
            let text = encoder.tokenizer.decode(ids, true).unwrap_or_default();
            // A character may still be in the making at the end.
            let whole = text.trim_end_matches('\u{fffd}');
            if whole.len() <= *shown || !whole.is_char_boundary(*shown) {
                return true;
            }
            let is_open = out.write_all(&whole.as_bytes()[*shown..]).and_then(|()| out.flush()).is_ok();
            *shown = whole.len();
            is_open
        };
        generate(&opened.model, Some(encoder.tokenizer), &[prompt], &config, &opened.sites, |_, token| {
            if !config.stop_ids.contains(&token) {
                ids.push(token);
            }
            show(&ids, &mut shown, &mut stdout)
        })?;
        writeln!(stdout)?;
        messages.push(Message::new("assistant", encoder.tokenizer.decode(&ids, true)?));
    }
}
