//! Stop texts: where a completion ends that spells one of them, and what of it can be told before that is known.

use crate::Result;
use crate::tokenizer::Tokenizer;

/// The texts that end a completion; none is empty.
pub(super) struct StopTexts<'a> {
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) texts: &'a [String],
}

/// What the tokens so far spell.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// No stop text; this many tokens cannot become part of one.
    Settled(usize),
    /// A stop text.
    Stop {
        /// The fewest tokens that hold all text before it.
        kept: usize,
        /// The tokens that lie before it whole; `kept`, or fewer where it begins inside a token.
        before: usize,
        /// The text before it, without special tokens.
        text: String,
    },
}

impl StopTexts<'_> {
    /// Looks for stop texts in a completion of which the first `heard` tokens are known to be free of them.
    pub(super) fn look(&self, token_ids: &[i64], heard: usize) -> Result<Seen> {
        // Special tokens are spelled out, so that one can be given as a stop text.
        let spelled = |count: usize| self.tokenizer.decode(&token_ids[..count], false);
        let text = spelled(token_ids.len())?;
        let stop = self.texts.iter().filter_map(|stop| text.find(stop.as_str())).min();
        let end = &text[..stop.unwrap_or_else(|| text.len() - self.undecided(&text))];
        // The most tokens that spell a beginning of `end`. A token may end within a character, which then spells
        // U+FFFD and no beginning, so that more tokens can do where fewer do not: the search goes down.
        let (mut whole, mut whole_text) = (heard, end.to_string());
        for count in (heard..=token_ids.len()).rev() {
            let beginning = spelled(count)?;
            if end.starts_with(&beginning) {
                (whole, whole_text) = (count, beginning);
                break;
            }
        }
        if stop.is_none() {
            return Ok(Seen::Settled(whole));
        }
        let mut kept = whole;
        while !spelled(kept)?.starts_with(end) {
            kept += 1; // at the latest, all tokens spell `text`, which starts with `end`
        }
        let text = self.tokenizer.decode(&token_ids[..whole], true)? + &end[whole_text.len()..];
        Ok(Seen::Stop { kept, before: whole, text })
    }

    /// Bytes at the end of a text that may be the beginning of a stop text, or a character in the making.
    fn undecided(&self, text: &str) -> usize {
        let whole = text.trim_end_matches('\u{fffd}');
        let is_beginning = |&at: &usize| self.texts.iter().any(|stop| stop.starts_with(&whole[at..]));
        let at = whole.char_indices().map(|(at, _)| at).find(is_beginning);
        text.len() - at.unwrap_or(whole.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::Gguf;
    use std::path::Path;

    fn tokenizer() -> Tokenizer {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tokenizer/smollm/vocab.gguf");
        Tokenizer::from_gguf(&path, Gguf::open(&path).unwrap().metadata()).unwrap().unwrap()
    }

    /// What is seen after each token of `text`, up to a stop text.
    fn seen(tokenizer: &Tokenizer, text: &str, texts: &[&str]) -> (Vec<i64>, Vec<Seen>) {
        let texts: Vec<String> = texts.iter().map(ToString::to_string).collect();
        let stops = StopTexts { tokenizer, texts: &texts };
        let ids = tokenizer.encode(text).unwrap();
        let (mut all, mut heard) = (vec![], 0);
        for count in 1..=ids.len() {
            let seen = stops.look(&ids[..count], heard).unwrap();
            if let Seen::Settled(settled) = seen {
                heard = settled;
            }
            let is_stop = matches!(seen, Seen::Stop { .. });
            all.push(seen);
            if is_stop {
                break;
            }
        }
        (ids, all)
    }

    #[test]
    fn tokens_that_may_spell_a_stop_text_are_held_back() {
        let tokenizer = tokenizer();
        let stop = tokenizer.decode(&tokenizer.encode("\n\nQ").unwrap(), false).unwrap();
        let (ids, all) = seen(&tokenizer, "a b\n\nQ c", &[&stop]);
        let spelled = |count: usize| tokenizer.decode(&ids[..count], false).unwrap();
        for (index, seen) in all[..all.len() - 1].iter().enumerate() {
            let Seen::Settled(settled) = *seen else { panic!("{seen:?}") };
            assert!("a b".starts_with(&spelled(settled)), "{:?} was told after {} tokens", spelled(settled), index + 1);
        }
        let Some(Seen::Stop { kept, before, text }) = all.last() else { panic!("{all:?}") };
        assert_eq!(text, "a b");
        assert!(spelled(*kept).starts_with("a b") && "a b".starts_with(&spelled(*before)), "{kept} {before}");
    }

    #[test]
    fn a_beginning_that_goes_on_otherwise_is_told() {
        let tokenizer = tokenizer();
        let (ids, all) = seen(&tokenizer, "a b\n\nR c", &["\n\nQ"]);
        assert_eq!(all.last(), Some(&Seen::Settled(ids.len())));
    }

    #[test]
    fn a_stop_text_inside_a_token_keeps_the_text_before_it() {
        let tokenizer = tokenizer();
        let token = tokenizer.encode(" the").unwrap();
        assert_eq!(token.len(), 1, "a token of several characters");
        let (_, all) = seen(&tokenizer, " the", &["he"]);
        assert_eq!(all, [Seen::Stop { kept: 1, before: 0, text: " t".into() }]);
    }

    #[test]
    fn a_character_in_the_making_waits_for_its_end() {
        let tokenizer = tokenizer();
        let (ids, all) = seen(&tokenizer, "\u{1f9a9}", &["x"]);
        assert!(ids.len() > 1 && all[0] == Seen::Settled(0), "{all:?}");
        assert_eq!(all.last(), Some(&Seen::Settled(ids.len())));
    }
}
