//! `pt chat`

use super::generate::Sampling;
use crate::open::{ModelArgs, WeightArgs};
use crate::talk::{self, Refused};
use anyhow::{Context, Result};
use pt_model::generate;
use pt_train::data::{Encode, Message};
use std::io::{BufRead, IsTerminal, Write};
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    weights: WeightArgs,
    /// System message at the start of the conversation.
    #[arg(long)]
    system: Option<String>,
    #[command(flatten)]
    sampling: Sampling,
}

pub(crate) fn run(args: Args) -> Result<ExitCode> {
    let opened = args.model.open(&args.weights)?;
    let encoder = opened.encoder()?;
    if !encoder.has_template() {
        return Err(Refused {
            message: format!("{}: the model carries no chat template", opened.pretrained.path.display()),
            hint: "complete plain text with `pt generate --prompt TEXT`".into(),
        }
        .into());
    }
    let config = args.sampling.config(encoder.stop_ids());
    let context = opened.model.config().max_position_embeddings as usize;
    let context = context.saturating_sub(opened.sites.num_virtual_tokens());
    let system: Vec<Message> = args.system.iter().map(|text| Message::new("system", text.as_str())).collect();
    let mut messages = system.clone();
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
                messages = system.clone();
                continue;
            }
            text => messages.push(Message::new("user", text)),
        }
        let room = config.max_new_tokens.min(context / 4).max(1);
        let Some(prompt) = fitting_prompt(&encoder, &mut messages, system.len(), context, room)? else {
            eprintln!("that message alone is longer than the context of {context} tokens: shorten it");
            messages.pop();
            continue;
        };
        let (mut ids, mut shown, mut closed) = (Vec::new(), 0, None);
        let rows = generate(&opened.model, Some(encoder.tokenizer), &[prompt], &config, &opened.sites, |_, token| {
            if !config.stop_ids.contains(&token) {
                ids.push(token);
            }
            let text = encoder.tokenizer.decode(&ids, true).unwrap_or_default();
            // A character may still be in the making at the end.
            closed = show(text.trim_end_matches('\u{fffd}'), &mut shown).err();
            closed.is_none()
        })?;
        if let Some(closed) = closed {
            return Err(closed);
        }
        let answer = rows.into_iter().find_map(|row| row.text).unwrap_or_default();
        show(&answer, &mut shown)?;
        talk::say("")?;
        messages.push(Message::new("assistant", answer));
    }
}

/// Prints what of `text` is not on the screen yet.
fn show(text: &str, shown: &mut usize) -> Result<()> {
    if let Some(new) = text.get(*shown..).filter(|new| !new.is_empty()) {
        talk::put(new.as_bytes())?;
        *shown = text.len();
    }
    Ok(())
}

/// Token ids of the conversation, less its oldest questions and answers where it leaves no `room` in the context;
/// `None` when not even the last message fits.
fn fitting_prompt(
    encoder: &dyn Encode,
    messages: &mut Vec<Message>,
    num_system: usize,
    context: usize,
    room: usize,
) -> Result<Option<Vec<i64>>> {
    let mut num_dropped = 0;
    loop {
        let text = encoder.render(messages, None, true).map_err(anyhow::Error::msg).context("the chat template")?;
        let ids = encoder.encode(&text).map_err(anyhow::Error::msg)?;
        let is_alone = messages.len() < num_system + 3;
        if ids.len() + room <= context || is_alone {
            if num_dropped > 0 {
                eprintln!("(the context of {context} tokens is full: the {num_dropped} oldest messages are forgotten)");
            }
            return Ok(Some(ids).filter(|ids| ids.len() < context));
        }
        messages.drain(num_system..num_system + 2);
        num_dropped += 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ten tokens a message.
    struct Ten;

    impl Encode for Ten {
        fn encode(&self, text: &str) -> Result<Vec<i64>, String> {
            Ok(vec![0; text.len()])
        }
        fn decode(&self, _: &[i64]) -> String {
            String::new()
        }
        fn render(&self, messages: &[Message], _: Option<&serde_json::Value>, _: bool) -> Result<String, String> {
            Ok("0123456789".repeat(messages.len()))
        }
        fn stop_ids(&self) -> &[i64] {
            &[]
        }
    }

    #[test]
    fn the_oldest_turns_go_and_the_system_message_stays() {
        let roles = ["system", "user", "assistant", "user", "assistant", "user"];
        let mut messages: Vec<Message> = roles.iter().map(|role| Message::new(*role, "x")).collect();
        let prompt = fitting_prompt(&Ten, &mut messages, 1, 45, 5).unwrap().unwrap();
        assert_eq!((prompt.len(), messages.len(), messages[0].role.as_str()), (40, 4, "system"));
        assert_eq!(fitting_prompt(&Ten, &mut messages, 1, 20, 5).unwrap(), None);
        assert_eq!(messages.len(), 2);
    }
}
