//! Preference data: prompts with completions and what was judged of them.
//!
//! A pair, a ranked list and an unpaired row are one thing here: a [`PromptGroup`] with a [`Judgement`]. Losses on pairs
//! ask for [`PreferenceGroup::pairs`], which name completions by index: the prompt goes through the model once, each
//! completion once, however many pairs there are.

use std::collections::{HashMap, HashSet};

use pt_model::{Completion, PromptGroup};
use sha2::{Digest, Sha256};

use super::groups::{RowEncoder, common_prefix};
use super::{Encode, Row, RowContent, Text};
use crate::error::{Result, TrainError};
use crate::objective::Example;

/// What was judged of the completions of one prompt.
#[derive(Clone, Debug, PartialEq)]
pub enum Judgement {
    /// Some are better than others.
    Ranks {
        /// Rank of each completion, 0 the best, without gaps; equal ranks are ties. A pair is `[0, 1]`.
        ranks: Vec<u32>,
        /// What each is worth, higher better, where that is known.
        scores: Option<Scores>,
    },
    /// Whether each is desirable, as KTO takes it.
    Labels(Vec<bool>),
}

/// What completions are worth: a number each, higher better.
#[derive(Clone, Debug, PartialEq)]
pub struct Scores {
    values: Vec<f64>,
    is_margin: bool,
}

impl Scores {
    /// Of a pair whose row says by how much the chosen side is to lead: `[margin, 0]`.
    pub fn of_margin(margin: f64) -> Self {
        Self { values: vec![margin, 0.0], is_margin: true }
    }
}

impl From<&[f64]> for Scores {
    fn from(values: &[f64]) -> Self {
        Self { values: values.into(), is_margin: false }
    }
}

impl FromIterator<f64> for Scores {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        Self { values: values.into_iter().collect(), is_margin: false }
    }
}

impl std::ops::Deref for Scores {
    type Target = [f64];

    fn deref(&self) -> &[f64] {
        &self.values
    }
}

/// One completion that was preferred to another of the same prompt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pair {
    /// Index of the better completion.
    pub chosen: usize,
    /// Index of the worse one.
    pub rejected: usize,
    /// By how much, in the unit of the rows' `margin` or `scores`; 0 where they say nothing. Which of the two it is
    /// [`Judgement::states_margin`] tells.
    pub margin: f64,
}

impl Judgement {
    /// Whether the row itself names the margin of its pair (a field `margin`): it is meant for the loss as it stands,
    /// while a difference of `scores` is in whatever unit the judge had.
    pub fn states_margin(&self) -> bool {
        matches!(self, Self::Ranks { scores: Some(Scores { is_margin: true, .. }), .. })
    }

    /// Every pair of completions of different ranks, in the order of their indices; none for labels.
    ///
    /// # Example
    /// ```
    /// use pt_train::data::Judgement;
    /// let judgement = Judgement::Ranks { ranks: vec![1, 0, 1], scores: None };
    /// let pairs: Vec<_> = judgement.pairs().iter().map(|pair| (pair.chosen, pair.rejected)).collect();
    /// assert_eq!(pairs, [(1, 0), (1, 2)]);
    /// ```
    pub fn pairs(&self) -> Vec<Pair> {
        let Self::Ranks { ranks, scores } = self else { return Vec::new() };
        let margin =
            |chosen: usize, rejected: usize| scores.as_ref().map_or(0.0, |scores| scores[chosen] - scores[rejected]);
        let mut pairs = Vec::new();
        for (one, other) in (0..ranks.len()).flat_map(|one| (one + 1..ranks.len()).map(move |other| (one, other))) {
            let (chosen, rejected) = match ranks[one].cmp(&ranks[other]) {
                std::cmp::Ordering::Less => (one, other),
                std::cmp::Ordering::Greater => (other, one),
                std::cmp::Ordering::Equal => continue,
            };
            pairs.push(Pair { chosen, rejected, margin: margin(chosen, rejected) });
        }
        pairs
    }
}

/// One prompt, its completions, and what was judged of them.
#[derive(Clone, Debug, PartialEq)]
pub struct PreferenceGroup {
    /// The tokens; every token of a completion is scored, the end of the turn included.
    pub group: PromptGroup,
    /// As many ranks or labels as the group has completions.
    pub judgement: Judgement,
    /// Factor of this row's loss, at least 0; 1 where the row says nothing.
    pub weight: f64,
}

impl PreferenceGroup {
    /// As [`Judgement::pairs`].
    pub fn pairs(&self) -> Vec<Pair> {
        self.judgement.pairs()
    }

    /// Tokens that go through the model: the prompt once, each completion once.
    pub fn num_tokens(&self) -> usize {
        self.group.num_tokens()
    }

    /// Tokens that would go through the model if each side of each pair (or each labelled completion) were a
    /// sequence of its own.
    pub fn num_tokens_apart(&self) -> usize {
        let sequence = |index: usize| self.group.prompt.len() + self.group.completions[index].token_ids.len();
        match &self.judgement {
            Judgement::Ranks { .. } => {
                self.pairs().iter().map(|pair| sequence(pair.chosen) + sequence(pair.rejected)).sum()
            }
            Judgement::Labels(labels) => (0..labels.len()).map(sequence).sum(),
        }
    }
}

impl Example for PreferenceGroup {
    fn group(&self) -> &PromptGroup {
        &self.group
    }

    fn digest(&self, sink: &mut dyn FnMut(&[u8])) {
        self.group.digest(sink);
        match &self.judgement {
            Judgement::Ranks { ranks, scores } => {
                ranks.iter().for_each(|rank| sink(&rank.to_le_bytes()));
                scores.iter().flat_map(|scores| scores.iter()).for_each(|score| sink(&score.to_le_bytes()));
            }
            Judgement::Labels(labels) => labels.iter().for_each(|&label| sink(&[u8::from(label)])),
        }
        sink(&self.weight.to_le_bytes());
    }
}

/// Ranks from 0 without gaps, of values of which the lowest is the best.
pub(super) fn dense_ranks(values: &[f64]) -> Vec<u32> {
    // Adding 0 makes a zero of either sign the same.
    let mut steps: Vec<f64> = values.iter().map(|value| value + 0.0).collect();
    steps.sort_by(f64::total_cmp);
    steps.dedup();
    values.iter().map(|value| steps.partition_point(|step| step < value) as u32).collect()
}

/// The group of a row that judges completions: the prompt that they share, then each of them.
///
/// Without a `prompt` field the turns that all conversations share are the prompt, but never the last turn of one; of
/// plain texts, the characters that all share, less a space at their end (as TRL 1.16 does it). Where a token merges
/// across the boundary in any completion, the tokens that all share are the prompt. Every token after the prompt is
/// scored, also those of a user's turns within a completion of several, as in TRL.
///
/// # Errors
/// As [`row_to_group`](super::row_to_group); [`TrainError::WrongForm`] for a row of another form.
pub fn row_to_preference(row: &Row, encoder: &dyn Encode) -> Result<PreferenceGroup> {
    let RowContent::Preference { prompt, completions, judgement, weight, tools } = &row.content else {
        return Err(TrainError::WrongForm {
            origin: row.origin.clone(),
            found: row.content.form(),
            task: "preference training",
        });
    };
    let row_encoder = RowEncoder { encoder, origin: &row.origin };
    let (prompt, completions) = explicit(prompt.as_ref(), completions);
    let mut sequences: Vec<Vec<i64>> = Vec::with_capacity(completions.len());
    let mut is_scored = Vec::with_capacity(completions.len());
    let mut start = usize::MAX;
    for completion in &completions {
        let group = row_encoder.completion(&prompt, completion, tools.as_ref())?;
        start = start.min(group.prompt.len());
        // The end of the prompt may come to stand in an empty completion, and must not make it look like one that is not.
        is_scored.push(group.num_labels() > 0);
        let tokens: Vec<i64> = std::iter::once(group.prompt)
            .chain(group.completions.into_iter().map(|completion| completion.token_ids))
            .flatten()
            .collect();
        start = start.min(sequences.first().map_or(usize::MAX, |first| common_prefix(first, &tokens)));
        sequences.push(tokens);
    }
    let prompt = sequences.first().map_or_else(Vec::new, |tokens| tokens[..start].to_vec());
    let completion = |(tokens, is_scored): (Vec<i64>, bool)| {
        let token_ids = tokens[start..].to_vec();
        let is_label = vec![is_scored; token_ids.len()];
        Completion { token_ids, is_label }
    };
    let completions = sequences.into_iter().zip(is_scored).map(completion).collect();
    let group = PromptGroup { prompt, completions };
    Ok(PreferenceGroup { group, judgement: judgement.clone(), weight: *weight })
}

impl Row {
    /// The same row; the prompt that its completions share stands by itself, where it judges completions.
    #[must_use]
    pub fn with_explicit_prompt(&self) -> Self {
        let mut row = self.clone();
        if let RowContent::Preference { prompt, completions, .. } = &mut row.content {
            let (shared, rest) = explicit(prompt.as_ref(), completions);
            (*prompt, *completions) = (Some(shared), rest);
        }
        row
    }
}

/// The prompt of completions that hold it each, and what is left of them.
pub(super) fn explicit(prompt: Option<&Text>, completions: &[Text]) -> (Text, Vec<Text>) {
    if let Some(prompt) = prompt {
        return (prompt.clone(), completions.to_vec());
    }
    match completions.first() {
        Some(Text::Chat(first)) => {
            let turns = |text: &Text| if let Text::Chat(messages) = text { messages.clone() } else { Vec::new() };
            let all: Vec<_> = completions.iter().map(turns).collect();
            let shared = |other: &Vec<_>| {
                let same = first.iter().zip(other).take_while(|(one, other)| one == other).count();
                same.min(other.len().saturating_sub(1))
            };
            let shared = all.iter().map(shared).min().unwrap_or(0);
            let rest = all.into_iter().map(|messages| Text::Chat(messages[shared..].to_vec())).collect();
            (Text::Chat(first[..shared].to_vec()), rest)
        }
        Some(Text::Plain(first)) => {
            let texts: Vec<&str> =
                completions.iter().map(|text| if let Text::Plain(text) = text { text.as_str() } else { "" }).collect();
            let shared = |other: &&str| {
                let same = first.chars().zip(other.chars()).take_while(|(one, other)| one == other);
                same.map(|(one, _)| one.len_utf8()).sum()
            };
            let shared: usize = texts.iter().map(shared).min().unwrap_or(0);
            // A space belongs to the word after it: tokenizers have it in one token with that word.
            let prompt = &first[..shared];
            let prompt = prompt.strip_suffix(' ').unwrap_or(prompt);
            let rest = texts.iter().map(|text| Text::Plain(text[prompt.len()..].to_owned())).collect();
            (Text::Plain(prompt.to_owned()), rest)
        }
        None => (Text::Plain(String::new()), Vec::new()),
    }
}

/// How much of a set is kept from training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum HeldOut {
    /// This part of the prompts, between 0 and 1.
    Fraction(f64),
    /// This many prompts.
    Prompts(usize),
}

/// Splits rows into those to train on and those held out, so that no prompt has rows on both sides.
///
/// Each prompt draws its lot from the seed and its own text, so rows may be added or reordered without moving the others
/// much. Rows keep their order. At least one prompt stays on each side.
///
/// # Errors
/// [`TrainError::Config`] when the part is not between 0 and 1, or leaves a side without prompts.
pub fn split_by_prompt(rows: Vec<Row>, held_out: HeldOut, seed: u64) -> Result<(Vec<Row>, Vec<Row>)> {
    let keys: Vec<String> = rows.iter().map(Row::prompt_key).collect();
    let prompts: HashSet<&str> = keys.iter().map(String::as_str).collect();
    let fault = |message: String| Err(TrainError::Config { place: "held-out rows".into(), message });
    let count = match held_out {
        HeldOut::Fraction(part) if part > 0.0 && part < 1.0 => {
            ((prompts.len() as f64 * part).round() as usize).clamp(1, prompts.len().saturating_sub(1).max(1))
        }
        HeldOut::Fraction(part) => return fault(format!("the part is {part}, expected between 0 and 1")),
        HeldOut::Prompts(count) => count,
    };
    if count == 0 || count >= prompts.len() {
        return fault(format!("{count} of {} prompts held out leave a side with none", prompts.len()));
    }
    let lot = |prompt: &str| Sha256::new().chain_update(seed.to_le_bytes()).chain_update(prompt.as_bytes()).finalize();
    let mut lots: Vec<_> = prompts.iter().map(|prompt| (lot(prompt), *prompt)).collect();
    lots.sort();
    let held_out: HashSet<&str> = lots.iter().take(count).map(|(_, prompt)| *prompt).collect();
    let mut sides = (Vec::new(), Vec::new());
    for (row, key) in rows.into_iter().zip(&keys) {
        let side = if held_out.contains(key.as_str()) { &mut sides.1 } else { &mut sides.0 };
        side.push(row);
    }
    Ok(sides)
}

/// Unpaired rows with one prompt as one group, so that their prompt is computed once; the others stay as they are.
///
/// Rows of different weights are not joined. A group takes the place of its first row, whose index among `groups` stands
/// in the second list.
pub fn join_labels(groups: Vec<PreferenceGroup>) -> (Vec<PreferenceGroup>, Vec<usize>) {
    let (mut joined, mut first_rows): (Vec<PreferenceGroup>, Vec<usize>) = (Vec::new(), Vec::new());
    let mut place: HashMap<(Vec<i64>, u64), usize> = HashMap::new();
    for (row, group) in groups.into_iter().enumerate() {
        let Judgement::Labels(labels) = &group.judgement else {
            joined.push(group);
            first_rows.push(row);
            continue;
        };
        let at = *place.entry((group.group.prompt.clone(), group.weight.to_bits())).or_insert(joined.len());
        match joined.get_mut(at) {
            Some(PreferenceGroup { group: first, judgement: Judgement::Labels(all), .. }) => {
                all.extend(labels);
                first.completions.extend(group.group.completions);
            }
            _ => {
                joined.push(group);
                first_rows.push(row);
            }
        }
    }
    (joined, first_rows)
}

#[cfg(test)]
mod tests {
    use super::super::groups::testing::*;
    use super::super::{Message, TooLong, fit};
    use super::*;
    use proptest::prelude::*;

    fn ranked(prompt: Option<Text>, completions: Vec<Text>, ranks: &[u32]) -> RowContent {
        let judgement = Judgement::Ranks { ranks: ranks.into(), scores: None };
        RowContent::Preference { prompt, completions, judgement, weight: 1.0, tools: None }
    }

    fn text(text: &str) -> Text {
        Text::Plain(text.into())
    }

    fn turns(turns: &[(&str, &str)]) -> Text {
        Text::Chat(turns.iter().map(|(role, text)| Message::new(*role, *text)).collect())
    }

    /// The prompt's text and each completion's.
    fn parts(content: RowContent) -> (String, Vec<String>) {
        let group = row_to_preference(&row(content, 1), &CHARACTERS).expect("a good row").group;
        let completions = group.completions.iter().map(|completion| CHARACTERS.decode(&completion.token_ids));
        (CHARACTERS.decode(&group.prompt), completions.collect())
    }

    fn expected(prompt: &str, completions: &[&str]) -> (String, Vec<String>) {
        (prompt.into(), completions.iter().map(|text| (*text).to_owned()).collect())
    }

    #[test]
    fn ranks_give_every_untied_pair_and_margins_come_from_scores() {
        let judgement =
            Judgement::Ranks { ranks: vec![2, 0, 1, 1], scores: Some([0.0, 9.0, 4.0, 5.0].into_iter().collect()) };
        let pairs: Vec<_> = judgement.pairs().iter().map(|pair| (pair.chosen, pair.rejected, pair.margin)).collect();
        assert_eq!(pairs, [(1, 0, 9.0), (2, 0, 4.0), (3, 0, 5.0), (1, 2, 5.0), (1, 3, 4.0)]);
        let margin = Judgement::Ranks { ranks: vec![0, 1], scores: Some(Scores::of_margin(2.5)) };
        assert!(margin.states_margin() && !judgement.states_margin() && margin.pairs()[0].margin == 2.5);
        assert_eq!(Judgement::Labels(vec![true, false]).pairs(), []);
        assert_eq!(dense_ranks(&[2.0, -0.0, 0.0, 7.5]), [1, 0, 0, 2]);
    }

    #[test]
    fn a_pair_shares_its_prompt_explicit_or_not() {
        let (yes, no) = (("assistant", "yes"), ("assistant", "no"));
        let whole = ranked(None, vec![turns(&[("user", "q"), yes]), turns(&[("user", "q"), no])], &[0, 1]);
        let apart = ranked(Some(turns(&[("user", "q")])), vec![turns(&[yes]), turns(&[no])], &[0, 1]);
        assert_eq!(parts(whole), expected("<u|q$\n<a|", &["yes$\n", "no$\n"]));
        assert_eq!(parts(apart), expected("<u|q$\n<a|", &["yes$\n", "no$\n"]));
        let plain = ranked(None, vec![text("is it? yes"), text("is it? no")], &[0, 1]);
        assert_eq!(parts(plain), expected("is it?", &[" yes$", " no$"]));
    }

    #[test]
    fn several_turns_may_differ_and_the_last_is_never_shared() {
        let one = turns(&[("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]);
        let other = turns(&[("user", "q"), ("assistant", "a")]);
        let differing = ranked(None, vec![one, other.clone()], &[0, 1]);
        assert_eq!(parts(differing), expected("<u|q$\n<a|", &["a$\n<u|r$\n<a|b$\n", "a$\n"]));
        assert_eq!(parts(ranked(None, vec![other.clone(), other], &[0, 1])), expected("<u|q$\n<a|", &["a$\n", "a$\n"]));
    }

    #[test]
    fn a_token_that_merges_in_one_completion_shortens_the_prompt_of_all() {
        // "t" and "h" are one token in the second.
        let content = ranked(Some(text("at")), vec![text("o"), text("he"), text("a")], &[0, 1, 1]);
        assert_eq!(parts(content), expected("a", &["to$", "the$", "ta$"]));
    }

    #[test]
    fn other_forms_are_refused_and_an_empty_side_stays_empty() {
        let error = row_to_preference(&row(plain("a", "b"), 3), &CHARACTERS).expect_err("no judgement");
        assert_eq!(
            error.to_string(),
            "rows.jsonl:3: a prompt/completion row cannot be trained on by preference training"
        );
        assert_eq!(parts(ranked(Some(text("ab")), vec![text("c"), text("")], &[0, 1])), expected("ab", &["c$", ""]));
    }

    #[test]
    fn the_length_policies_work_on_every_completion() {
        let content = || ranked(Some(text("abcdef")), vec![text("xyz"), text("uvwxyz"), text("x")], &[0, 1, 2]);
        let group = || row_to_preference(&row(content(), 1), &CHARACTERS).expect("good").group;
        assert_eq!(fit(group(), 12, TooLong::Drop), super::super::Fit::Dropped);
        let super::super::Fit::Cut(left) = fit(group(), 9, TooLong::TruncateLeft) else { panic!("room") };
        assert_eq!((CHARACTERS.decode(&left.prompt), left.longest_sequence()), ("ef".into(), 9));
        let super::super::Fit::Cut(right) = fit(group(), 8, TooLong::TruncateRight) else { panic!("room") };
        let lengths: Vec<_> = right.completions.iter().map(|completion| completion.token_ids.len()).collect();
        assert_eq!(lengths, [2, 2, 2]);
    }

    #[test]
    fn shared_prompts_save_tokens() {
        let content = ranked(Some(text("abcdef")), vec![text("x"), text("yz"), text("u")], &[0, 1, 2]);
        let group = row_to_preference(&row(content, 1), &CHARACTERS).expect("good");
        // 6 + 2 + 3 + 2, and three pairs of (6 + 2) + (6 + 3), 8 + 8, 9 + 8.
        assert_eq!((group.num_tokens(), group.num_tokens_apart()), (13, 50));
    }

    #[test]
    fn labels_of_one_prompt_join_where_their_weights_agree() {
        let unpaired = |prompt: &str, completion: &str, label, weight| {
            let content = RowContent::Preference {
                prompt: Some(text(prompt)),
                completions: vec![text(completion)],
                judgement: Judgement::Labels(vec![label]),
                weight,
                tools: None,
            };
            row_to_preference(&row(content, 1), &CHARACTERS).expect("good")
        };
        let groups = vec![unpaired("a", "x", true, 1.0), unpaired("b", "y", true, 1.0), unpaired("a", "z", false, 1.0)];
        let (joined, first_rows) = join_labels([groups, vec![unpaired("a", "w", true, 2.0)]].concat());
        assert_eq!(first_rows, [0, 1, 3]);
        let labels: Vec<_> = joined.iter().map(|group| group.judgement.clone()).collect();
        let expected = [vec![true, false], vec![true], vec![true]].map(Judgement::Labels);
        assert_eq!(labels, expected);
        assert_eq!(joined[0].group.completions.len(), 2);
    }

    fn pairs_of(prompts: &[&str]) -> Vec<Row> {
        let pair = |prompt: &str| ranked(Some(text(prompt)), vec![text("a"), text("b")], &[0, 1]);
        prompts.iter().enumerate().map(|(index, prompt)| row(pair(prompt), index + 1)).collect()
    }

    #[test]
    fn a_split_that_leaves_a_side_empty_is_refused() {
        let refused =
            |held_out| split_by_prompt(pairs_of(&["a", "b", "a"]), held_out, 0).expect_err("refused").to_string();
        assert_eq!(refused(HeldOut::Prompts(2)), "held-out rows: 2 of 2 prompts held out leave a side with none");
        assert_eq!(refused(HeldOut::Fraction(1.0)), "held-out rows: the part is 1, expected between 0 and 1");
        assert!(refused(HeldOut::Fraction(f64::NAN)).contains("NaN"));
        assert!(split_by_prompt(pairs_of(&["a", "a"]), HeldOut::Fraction(0.5), 0).is_err());
        assert!(split_by_prompt(Vec::new(), HeldOut::Fraction(0.5), 0).is_err());
    }

    proptest! {
        #[test]
        fn no_prompt_is_on_both_sides_and_no_row_is_lost(
            prompts in prop::collection::vec("[a-f]", 2..40), part in 0.01f64..0.99, seed in 0u64..5,
        ) {
            let texts: Vec<&str> = prompts.iter().map(String::as_str).collect();
            let distinct = texts.iter().collect::<HashSet<_>>().len();
            prop_assume!(distinct > 1);
            let rows = pairs_of(&texts);
            let (train, held_out) = split_by_prompt(rows.clone(), HeldOut::Fraction(part), seed).expect("two sides");
            prop_assert_eq!(train.len() + held_out.len(), rows.len());
            prop_assert!(!train.is_empty() && !held_out.is_empty());
            let seen: HashSet<String> = train.iter().map(Row::prompt_key).collect();
            prop_assert!(held_out.iter().all(|row| !seen.contains(&row.prompt_key())));
            let mut reversed = rows;
            reversed.reverse();
            let (mut again, _) = split_by_prompt(reversed, HeldOut::Fraction(part), seed).expect("two sides");
            again.reverse();
            prop_assert_eq!(again, train);
        }

        #[test]
        fn prompt_and_completion_are_the_sequence_that_each_would_be_alone(
            prompt in "[a-gt]{0,6}", completions in prop::collection::vec("[a-ht]{1,6}", 2..5),
        ) {
            let content = ranked(Some(text(&prompt)), completions.iter().map(|c| text(c)).collect(), &vec![0; completions.len()]);
            let group = row_to_preference(&row(content, 1), &CHARACTERS).expect("good").group;
            for (completion, words) in group.completions.iter().zip(&completions) {
                let alone = CHARACTERS.encode(&format!("{prompt}{words}$")).expect("ASCII");
                prop_assert_eq!([group.prompt.clone(), completion.token_ids.clone()].concat(), alone);
                prop_assert!(completion.is_label.iter().all(|&is_label| is_label));
            }
            prop_assert!(group.prompt.len() <= prompt.len().max(1));
        }
    }
}
