//! The pre-flight of preference data: what a set prefers, and what in it prefers nothing.
//!
//! Length policies, duplicates and ends of turns are judged as for any rows ([`checks`](super::checks)). Here come what
//! makes a preference void (an empty side, equal sides, ties throughout), contradictions, the length of the sides, and
//! what computing a prompt once saves.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;

use pt_model::PromptGroup;
use serde::{Deserialize, Serialize};

use super::checks::{Examined, Tally, first_of_sources, quantile, render_tokens, sieve, warnings};
use super::preferences::{Judgement, PreferenceGroup, row_to_preference};
use super::{DataConfig, Encode, Row, SourceSummary};
use crate::error::Result;
use crate::objective::Example;

/// Lengths of many sequences, in tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Lengths {
    /// Their mean.
    pub mean: f64,
    /// 95 % are no longer than this.
    pub p95: usize,
    /// The longest.
    pub max: usize,
}

impl Lengths {
    fn of(mut lengths: Vec<usize>) -> Self {
        lengths.sort_unstable();
        let mean = lengths.iter().sum::<usize>() as f64 / lengths.len().max(1) as f64;
        Self { mean, p95: quantile(&lengths, 0.95), max: quantile(&lengths, 1.0) }
    }

    fn to_text(&self) -> String {
        format!("{:.0}/{}/{}", self.mean, self.p95, self.max)
    }
}

/// Margins of the pairs of rows that say one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Margins {
    /// Their mean.
    pub mean: f64,
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
}

/// What one source prefers. Everything is of the rows that are kept.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PreferenceSource {
    /// Counts as of any rows; `tokens` has each prompt once.
    pub counts: SourceSummary,
    /// Rows left out because they prefer nothing, by reason.
    pub left_out: BTreeMap<String, usize>,
    /// Pairs of a better and a worse completion.
    pub pairs: usize,
    /// Pairs of completions that were judged equal, within rows that prefer something.
    pub tied_pairs: usize,
    /// Unpaired completions that are desirable.
    pub desirable: usize,
    /// Unpaired completions that are not.
    pub undesirable: usize,
    /// Pairs that an earlier row, of any source, has the other way round; labels that it has otherwise.
    pub contradictions: usize,
    /// Prompts, each row's once.
    pub prompt: Lengths,
    /// The better side of each pair, or the desirable completions.
    pub chosen: Lengths,
    /// The worse side of each pair, or the undesirable completions.
    pub rejected: Lengths,
    /// Pairs of which the chosen side has more tokens.
    pub chosen_longer: usize,
    /// Pairs of which the rejected side has more tokens.
    pub rejected_longer: usize,
    /// Tokens of an epoch if every side of every pair were a sequence of its own.
    pub tokens_apart: usize,
    /// By how much the chosen sides are better; `None` where no row says.
    pub margins: Option<Margins>,
}

/// What the pre-flight of preferences found, for the report and for machines.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PreferenceSummary {
    /// The limit that was applied, in tokens.
    pub max_length: usize,
    /// One entry a source, in the order of reading.
    pub sources: Vec<PreferenceSource>,
    /// Things worth a look that do not stop a run.
    pub warnings: Vec<String>,
}

impl PreferenceSummary {
    /// Rows that will be trained.
    pub fn kept(&self) -> usize {
        self.sources.iter().map(|source| source.counts.kept).sum()
    }

    /// Pairs in one epoch.
    pub fn pairs(&self) -> usize {
        self.sources.iter().map(|source| source.pairs).sum()
    }

    /// A table for a terminal, one line a source, then what is to be said of each, then the warnings.
    pub fn to_text(&self) -> String {
        let width = self.sources.iter().map(|source| source.counts.name.chars().count()).max().unwrap_or(0).max(6);
        let mut text = format!(
            "{:width$} {:>7} {:>7} {:>6} {:>6} {:>6} {:>6} {:>8} {:>14} {:>14} {:>14}  tokens, mean/p95/max\n",
            "source", "rows", "kept", "long", "cut", "void", "twice", "pairs", "prompt", "chosen", "rejected"
        );
        for source in &self.sources {
            let counts = &source.counts;
            let _ = writeln!(
                text,
                "{:width$} {:>7} {:>7} {:>6} {:>6} {:>6} {:>6} {:>8} {:>14} {:>14} {:>14}",
                counts.name,
                counts.rows,
                counts.kept,
                counts.over_long,
                counts.truncated,
                counts.dropped_empty,
                counts.duplicates,
                source.pairs,
                source.prompt.to_text(),
                source.chosen.to_text(),
                source.rejected.to_text(),
            );
        }
        for source in &self.sources {
            for line in source.lines() {
                let _ = writeln!(text, "{}: {line}", source.counts.name);
            }
        }
        for warning in &self.warnings {
            let _ = writeln!(text, "warning: {warning}");
        }
        text
    }
}

impl PreferenceSource {
    /// What is to be said of it beside the counts, a line each.
    pub(crate) fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let percent = |part: usize, whole: usize| 100.0 * part as f64 / whole.max(1) as f64;
        if self.desirable + self.undesirable > 0 {
            lines.push(format!("{} desirable and {} undesirable completions", self.desirable, self.undesirable));
        }
        if self.pairs > 0 {
            lines.push(format!(
                "the chosen side is the longer one in {:.1} % of {} pairs, the rejected one in {:.1} %",
                percent(self.chosen_longer, self.pairs),
                self.pairs,
                percent(self.rejected_longer, self.pairs)
            ));
        }
        let (shared, apart) = (self.counts.tokens, self.tokens_apart);
        if shared < apart {
            let saved = percent(apart - shared, apart);
            lines.push(format!("{shared} tokens an epoch; {apart} without shared prompts ({saved:.0} % saved)"));
        }
        if let Some(Margins { mean, min, max }) = &self.margins {
            lines.push(format!("margins of {mean:.3} on average, from {min:.3} to {max:.3}"));
        }
        lines
    }

    fn warnings(&self, config: &DataConfig) -> Vec<String> {
        let name = &self.counts.name;
        let mut found = warnings(&self.counts, config);
        found.extend(self.left_out.iter().map(|(why, count)| format!("{name}: {count} rows are left out: {why}")));
        if self.contradictions > 0 {
            let count = self.contradictions;
            found.push(format!("{name}: {count} judgements contradict an earlier row on the same completions"));
        }
        let differing = self.chosen_longer + self.rejected_longer;
        let longer = self.chosen_longer.max(self.rejected_longer);
        // With fewer pairs such a share is no sign of anything.
        if differing >= 50 && longer * 3 > differing * 2 {
            let (which, share) = if self.chosen_longer == longer { ("longer", longer) } else { ("shorter", longer) };
            found.push(format!(
                "{name}: the chosen side is the {which} one in {:.1} % of the pairs that differ in length, so length \
                 alone tells most of them",
                100.0 * share as f64 / differing as f64
            ));
        }
        let (less, more) = (self.desirable.min(self.undesirable), self.desirable.max(self.undesirable));
        if more > 0 && less == 0 {
            found.push(format!("{name}: all completions have the same label"));
        }
        found
    }
}

/// A checked set of preferences.
#[derive(Clone, Debug)]
pub struct PreferencePreflight {
    /// The groups to train, in the order of their rows.
    pub groups: Vec<PreferenceGroup>,
    /// For each group, its row in the input.
    pub row_of_group: Vec<usize>,
    /// Counts.
    pub summary: PreferenceSummary,
}

impl PreferencePreflight {
    /// The first kept group of each source, rendered by [`render_preference`] under a heading.
    pub fn examples(&self, rows: &[Row], encoder: &dyn Encode, colour: bool) -> Vec<String> {
        let render = |group: &PreferenceGroup| render_preference(group, encoder, colour);
        first_of_sources(&self.groups, &self.row_of_group, rows, colour, render)
    }
}

impl Examined for PreferenceGroup {
    const EMPTIED: &'static str = "a completion would have no token left";

    fn read(row: &Row, encoder: &dyn Encode, _: &DataConfig) -> Result<Self> {
        row_to_preference(row, encoder)
    }

    fn group(&self) -> &PromptGroup {
        &self.group
    }

    fn group_mut(&mut self) -> &mut PromptGroup {
        &mut self.group
    }

    fn fault(&self) -> Option<&'static str> {
        let completions = &self.group.completions;
        if completions.iter().any(|completion| !completion.is_label.contains(&true)) {
            return Some("a completion is empty");
        }
        let Judgement::Ranks { .. } = self.judgement else { return None };
        let pairs = self.pairs();
        if pairs.is_empty() {
            return Some("all ranks are tied, so nothing is preferred");
        }
        let is_void = |chosen: usize, rejected: usize| completions[chosen].token_ids == completions[rejected].token_ids;
        pairs.iter().any(|pair| is_void(pair.chosen, pair.rejected)).then_some(if completions.len() == 2 {
            "`chosen` and `rejected` are equal"
        } else {
            "two completions of different rank are equal"
        })
    }

    fn mark(&self) -> String {
        match &self.judgement {
            Judgement::Ranks { ranks, .. } => format!("{ranks:?}"),
            Judgement::Labels(labels) => format!("{labels:?}"),
        }
    }
}

/// Tokenizes all rows and checks them.
///
/// A row with an empty completion, with equal completions of different rank, before or after the cut to `max_length`, or
/// with ties throughout prefers nothing: `on_empty` says whether that is refused or such rows are left out.
///
/// # Errors
/// Those of [`row_to_preference`] and of [`preflight`](super::preflight).
pub fn preference_preflight(rows: &[Row], encoder: &dyn Encode, config: &DataConfig) -> Result<PreferencePreflight> {
    let sieved = sieve::<PreferenceGroup>(rows, encoder, config)?;
    let mut members: Vec<Vec<&PreferenceGroup>> = vec![Vec::new(); sieved.tallies.len()];
    for (group, &source) in sieved.items.iter().zip(&sieved.source_of_item) {
        members[source].push(group);
    }
    let mut seen = Seen::default();
    let sources: Vec<_> =
        sieved.tallies.into_iter().zip(&members).map(|(tally, groups)| describe(tally, groups, &mut seen)).collect();
    let warnings = sources.iter().flat_map(|source| source.warnings(config)).collect();
    let summary = PreferenceSummary { max_length: config.max_length, sources, warnings };
    Ok(PreferencePreflight { groups: sieved.items, row_of_group: sieved.row_of_item, summary })
}

/// Judgements so far, to find contradictions: of pairs (better, worse), of labels the completion and its label.
#[derive(Default)]
struct Seen<'a> {
    pairs: HashSet<(&'a [i64], &'a [i64], &'a [i64])>,
    labels: HashSet<(&'a [i64], &'a [i64], bool)>,
}

fn describe<'a>(mut tally: Tally, groups: &[&'a PreferenceGroup], seen: &mut Seen<'a>) -> PreferenceSource {
    let left_out = std::mem::take(&mut tally.left_out);
    let mut source = PreferenceSource { counts: tally.finish(), left_out, ..PreferenceSource::default() };
    let (mut prompts, mut chosen, mut rejected, mut margins) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for group in groups {
        let prompt = group.group.prompt.as_slice();
        let completions: Vec<&[i64]> =
            group.group.completions.iter().map(|completion| completion.token_ids.as_slice()).collect();
        prompts.push(prompt.len());
        source.tokens_apart += group.num_tokens_apart();
        match &group.judgement {
            Judgement::Ranks { scores, .. } => {
                let pairs = group.pairs();
                source.pairs += pairs.len();
                source.tied_pairs += completions.len() * (completions.len() - 1) / 2 - pairs.len();
                for pair in pairs {
                    let (better, worse) = (completions[pair.chosen], completions[pair.rejected]);
                    source.chosen_longer += usize::from(better.len() > worse.len());
                    source.rejected_longer += usize::from(better.len() < worse.len());
                    source.contradictions += usize::from(seen.pairs.contains(&(prompt, worse, better)));
                    seen.pairs.insert((prompt, better, worse));
                    chosen.push(better.len());
                    rejected.push(worse.len());
                    margins.extend(scores.is_some().then_some(pair.margin));
                }
            }
            Judgement::Labels(labels) => {
                for (&tokens, &label) in completions.iter().zip(labels) {
                    source.contradictions += usize::from(seen.labels.contains(&(prompt, tokens, !label)));
                    seen.labels.insert((prompt, tokens, label));
                    let (count, lengths) = if label {
                        (&mut source.desirable, &mut chosen)
                    } else {
                        (&mut source.undesirable, &mut rejected)
                    };
                    *count += 1;
                    lengths.push(tokens.len());
                }
            }
        }
    }
    source.margins = (!margins.is_empty()).then(|| Margins {
        mean: margins.iter().sum::<f64>() / margins.len() as f64,
        min: margins.iter().copied().fold(f64::INFINITY, f64::min),
        max: margins.iter().copied().fold(f64::NEG_INFINITY, f64::max),
    });
    (source.prompt, source.chosen, source.rejected) =
        (Lengths::of(prompts), Lengths::of(chosen), Lengths::of(rejected));
    source
}

/// How many examples of `held_out` have a prompt that also stands in `train`, token for token: a leak when it is not 0.
pub fn prompt_overlap<E: Example>(train: &[E], held_out: &[E]) -> usize {
    let seen: HashSet<&[i64]> = train.iter().map(|example| example.group().prompt.as_slice()).collect();
    held_out.iter().filter(|example| seen.contains(example.group().prompt.as_slice())).count()
}

/// A group's prompt, then each completion under its judgement, the best first; tokens are marked as
/// [`render_example`](super::render_example) does it.
pub fn render_preference(group: &PreferenceGroup, encoder: &dyn Encode, colour: bool) -> String {
    let mut text = render_tokens(&group.group.prompt, &[], encoder, colour);
    let mut order: Vec<usize> = (0..group.group.completions.len()).collect();
    if let Judgement::Ranks { ranks, .. } = &group.judgement {
        order.sort_by_key(|&index| ranks[index]);
    }
    for index in order {
        let completion = &group.group.completions[index];
        let judged = match &group.judgement {
            Judgement::Ranks { ranks, scores } if ranks.len() > 2 => {
                let score = scores.as_ref().map_or_else(String::new, |scores| format!(" (score {})", scores[index]));
                format!("rank {}{score}", ranks[index])
            }
            Judgement::Ranks { ranks, .. } => {
                let stated = group.pairs().first().filter(|_| group.judgement.states_margin()).map(|pair| pair.margin);
                let margin = stated.unwrap_or(0.0);
                let margin = if margin == 0.0 { String::new() } else { format!(" by a margin of {margin}") };
                if ranks[index] == 0 { format!("chosen{margin}") } else { "rejected".into() }
            }
            Judgement::Labels(labels) => if labels[index] { "desirable" } else { "undesirable" }.into(),
        };
        let heading = format!("-- {judged}, {} tokens:", completion.token_ids.len());
        let heading = if colour { format!("\x1b[1m{heading}\x1b[0m") } else { heading };
        let _ = writeln!(text, "{heading}");
        text.push_str(&render_tokens(&[], &[completion], encoder, colour));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::groups::testing::*;
    use super::super::preferences::Scores;
    use super::super::{Message, OnEmpty, RowContent, Text, TooLong};
    use super::*;
    use crate::error::TrainError;
    use proptest::prelude::*;

    fn ranked(prompt: &str, completions: &[&str], ranks: &[u32], scores: Option<&[f64]>) -> RowContent {
        RowContent::Preference {
            prompt: Some(Text::Plain(prompt.into())),
            completions: completions.iter().map(|text| Text::Plain((*text).into())).collect(),
            judgement: Judgement::Ranks { ranks: ranks.into(), scores: scores.map(Scores::from) },
            weight: 1.0,
            tools: None,
        }
    }

    fn pair(prompt: &str, chosen: &str, rejected: &str) -> RowContent {
        ranked(prompt, &[chosen, rejected], &[0, 1], None)
    }

    fn labelled(prompt: &str, completion: &str, label: bool) -> RowContent {
        RowContent::Preference {
            prompt: Some(Text::Plain(prompt.into())),
            completions: vec![Text::Plain(completion.into())],
            judgement: Judgement::Labels(vec![label]),
            weight: 1.0,
            tools: None,
        }
    }

    fn rows(contents: &[RowContent]) -> Vec<Row> {
        contents.iter().enumerate().map(|(index, content)| row(content.clone(), index + 1)).collect()
    }

    fn refused(contents: &[RowContent], config: &DataConfig) -> String {
        preference_preflight(&rows(contents), &CHARACTERS, config).expect_err("refused").to_string()
    }

    #[test]
    fn what_prefers_nothing_is_refused_with_its_row_and_reason() {
        let good = pair("ab", "c", "d");
        let check = |bad: RowContent| refused(&[good.clone(), bad], &DataConfig::default());
        let message = |why: &str| format!("rows.jsonl:2: {why} (1 such row(s) in all)");
        assert_eq!(check(pair("ab", "c", "c")), message("`chosen` and `rejected` are equal"));
        assert_eq!(check(pair("ab", "c", "")), message("a completion is empty"));
        // "t" stays behind in the empty side when "th" is one token in the other.
        assert_eq!(check(pair("at", "he", "")), message("a completion is empty"));
        let tied = ranked("ab", &["c", "d", "e"], &[0, 0, 0], None);
        assert_eq!(check(tied), message("all ranks are tied, so nothing is preferred"));
        let list = ranked("ab", &["c", "d", "c"], &[0, 1, 1], None);
        assert_eq!(check(list), message("two completions of different rank are equal"));
        let twins = ranked("ab", &["c", "d", "c"], &[0, 1, 0], None);
        assert!(preference_preflight(&rows(&[twins]), &CHARACTERS, &DataConfig::default()).is_ok());
    }

    #[test]
    fn sides_that_a_cut_makes_equal_are_found() {
        let config = DataConfig { max_length: 4, too_long: TooLong::TruncateRight, ..DataConfig::default() };
        let alike = pair("ab", "cdx", "cdy");
        let message = "rows.jsonl:1: cut to data.max_length, `chosen` and `rejected` are equal (1 such row(s) in all)";
        assert_eq!(refused(std::slice::from_ref(&alike), &config), message);
        assert_eq!(
            refused(&[pair("abcde", "x", "y")], &config),
            "rows.jsonl:1: cut to data.max_length, a completion would have no token left (1 such row(s) in all)"
        );
        let config = DataConfig { on_empty: OnEmpty::Drop, require_stop: false, ..config };
        let contents = [alike, pair("a", "b", "c"), pair("ab", "", "c"), pair("ab", "cdx", "dcy")];
        let checked = preference_preflight(&rows(&contents), &CHARACTERS, &config).expect("two are good");
        assert_eq!(checked.row_of_group, [1, 3]);
        let source = &checked.summary.sources[0];
        assert_eq!((source.counts.over_long, source.counts.truncated, source.counts.dropped_empty), (2, 1, 2));
        let reasons: Vec<_> = source.left_out.iter().map(|(why, count)| (why.as_str(), *count)).collect();
        let equal = "cut to data.max_length, `chosen` and `rejected` are equal";
        assert_eq!(reasons, [("a completion is empty", 1), (equal, 1)]);
        assert!(checked.summary.warnings.contains(&format!("rows: 1 rows are left out: {equal}")));
    }

    #[test]
    fn a_side_without_its_end_of_turn_is_told_and_a_source_of_them_refused() {
        let endless = Characters { rewrites: false, endless: true };
        let turn = |text: &str| Text::Chat(vec![Message::new("assistant", text)]);
        let content = RowContent::Preference {
            prompt: Some(Text::Chat(vec![Message::new("user", "q")])),
            completions: vec![turn("a"), turn("b")],
            judgement: Judgement::Ranks { ranks: vec![0, 1], scores: None },
            weight: 1.0,
            tools: None,
        };
        let rows = rows(&[content]);
        let error = preference_preflight(&rows, &endless, &DataConfig::default()).expect_err("no stop");
        assert!(matches!(error, TrainError::StopNotTrained { rows: 1, .. }), "{error}");
        let config = DataConfig { require_stop: false, ..DataConfig::default() };
        let checked = preference_preflight(&rows, &endless, &config).expect("asked for");
        assert_eq!(checked.summary.warnings, ["rows: 1 rows train no stop token"]);
        let rewriting = Characters { rewrites: true, endless: false };
        let error = row_to_preference(&conversation(), &rewriting).expect_err("not a prefix");
        assert!(matches!(error, TrainError::NotPrefixPreserving { .. }), "{error}");
    }

    /// A prompt that ends with an assistant's turn, which a rewriting template changes once another follows.
    fn conversation() -> Row {
        let turn = |role: &str, text: &str| Message::new(role, text);
        let content = RowContent::Preference {
            prompt: Some(Text::Chat(vec![turn("user", "q"), turn("assistant", "a")])),
            completions: ["b", "c"].map(|text| Text::Chat(vec![turn("assistant", text)])).into(),
            judgement: Judgement::Ranks { ranks: vec![0, 1], scores: None },
            weight: 1.0,
            tools: None,
        };
        row(content, 1)
    }

    #[test]
    fn the_summary_counts_pairs_lengths_and_what_sharing_saves() {
        let contents = [
            pair("abcd", "efg", "h"),
            pair("abcd", "h", "efg"),
            pair("abcd", "efg", "h"),
            ranked("ab", &["c", "d", "efgi"], &[1, 1, 0], Some(&[0.0, 0.5, 2.0])),
        ];
        let checked = preference_preflight(&rows(&contents), &CHARACTERS, &DataConfig::default()).expect("good");
        let source = &checked.summary.sources[0];
        assert_eq!((source.pairs, source.tied_pairs, source.contradictions), (5, 1, 2));
        assert_eq!((source.chosen_longer, source.rejected_longer), (4, 1));
        assert_eq!(source.counts.duplicates, 1, "the third is the first, the second is not");
        assert_eq!(source.prompt, Lengths { mean: 3.5, p95: 4, max: 4 });
        assert_eq!(source.chosen, Lengths { mean: 4.0, p95: 5, max: 5 });
        assert_eq!(source.rejected, Lengths { mean: 2.4, p95: 4, max: 4 });
        // 4 + 4 + 2 for the pairs, 2 + 2 + 2 + 5 for the list; apart 8 + 6 each and 2 · (7 + 4).
        assert_eq!((source.counts.tokens, source.tokens_apart), (41, 64));
        assert_eq!(source.margins, Some(Margins { mean: 1.75, min: 1.5, max: 2.0 }));
        let text = checked.summary.to_text();
        for line in [
            "rows: the chosen side is the longer one in 80.0 % of 5 pairs, the rejected one in 20.0 %\n",
            "rows: 41 tokens an epoch; 64 without shared prompts (36 % saved)\n",
            "rows: margins of 1.750 on average, from 1.500 to 2.000\n",
            "warning: rows: 2 judgements contradict an earlier row on the same completions\n",
        ] {
            assert!(text.contains(line), "{text}");
        }
        let json = serde_json::to_string(&checked.summary).expect("serialises");
        assert_eq!(serde_json::from_str::<PreferenceSummary>(&json).expect("parses"), checked.summary);
        let config = DataConfig { drop_duplicates: true, ..DataConfig::default() };
        let checked = preference_preflight(&rows(&contents), &CHARACTERS, &config).expect("good");
        assert_eq!(checked.row_of_group, [0, 1, 3]);
    }

    #[test]
    fn labels_are_counted_and_contradictions_and_one_sided_sets_told() {
        let contents = [labelled("ab", "c", true), labelled("ab", "cd", false), labelled("ab", "c", false)];
        let summary =
            preference_preflight(&rows(&contents), &CHARACTERS, &DataConfig::default()).expect("good").summary;
        let source = &summary.sources[0];
        assert_eq!((source.pairs, source.desirable, source.undesirable, source.contradictions), (0, 1, 2, 1));
        assert!(summary.to_text().contains("rows: 1 desirable and 2 undesirable completions\n"));
        let one_sided = preference_preflight(&rows(&contents[..1]), &CHARACTERS, &DataConfig::default()).expect("good");
        assert!(one_sided.summary.warnings.contains(&"rows: all completions have the same label".to_owned()));
    }

    #[test]
    fn a_set_that_prefers_the_longer_side_is_told() {
        let prompts: Vec<String> = (0..60).map(|index| format!("p{index}")).collect();
        let contents: Vec<_> = prompts.iter().map(|prompt| pair(prompt, "long", "s")).collect();
        let checked = preference_preflight(&rows(&contents), &CHARACTERS, &DataConfig::default()).expect("good");
        let told = |text: &String| text.contains("the chosen side is the longer one in 100.0 % of the pairs");
        assert!(checked.summary.warnings.iter().any(told), "{:?}", checked.summary.warnings);
    }

    #[test]
    fn overlap_is_by_prompt() {
        let contents = [pair("ab", "c", "d"), pair("ab", "e", "f"), pair("x", "c", "d")];
        let groups = preference_preflight(&rows(&contents), &CHARACTERS, &DataConfig::default()).expect("good").groups;
        assert_eq!(prompt_overlap(&groups[..1], &groups[1..]), 1);
        assert_eq!(prompt_overlap(&groups[..1], &groups[2..]), 0);
    }

    #[test]
    fn an_example_shows_the_prompt_once_and_each_side_with_its_end() {
        let mut scored = ranked("ab", &["d", "c"], &[0, 1], Some(&[1.5, 0.0]));
        let told = |content: &RowContent| {
            let group = row_to_preference(&row(content.clone(), 1), &CHARACTERS).expect("good");
            render_preference(&group, &CHARACTERS, false).contains("-- chosen by a margin of 1.5, 2 tokens")
        };
        // A difference of scores is no margin yet.
        assert!(!told(&scored));
        if let RowContent::Preference { judgement, .. } = &mut scored {
            *judgement = Judgement::Ranks { ranks: vec![0, 1], scores: Some(Scores::of_margin(1.5)) };
        }
        let rows = rows(&[scored]);
        let checked = preference_preflight(&rows, &CHARACTERS, &DataConfig::default()).expect("good");
        let text = checked.examples(&rows, &CHARACTERS, false).concat();
        let expected = "rows (rows.jsonl:1): 6 tokens, 4 trained\nab\n-- chosen by a margin of 1.5, 2 tokens:\n\
                        [[d]]{{$}}\n-- rejected, 2 tokens:\n[[c]]{{$}}\n";
        assert_eq!(text, expected);
        let group = row_to_preference(&row(labelled("ab", "c", false), 1), &CHARACTERS).expect("good");
        assert!(render_preference(&group, &CHARACTERS, true).contains("\x1b[1m-- undesirable, 2 tokens:\x1b[0m\n"));
    }

    proptest! {
        #[test]
        fn what_is_kept_prefers_something_and_fits(
            sides in prop::collection::vec(("[ab]{0,3}", "[ab]{0,5}", "[ab]{0,5}"), 1..12), max_length in 3usize..10,
        ) {
            let contents: Vec<_> = sides.iter().map(|(prompt, one, other)| pair(prompt, one, other)).collect();
            for too_long in [TooLong::Drop, TooLong::TruncateLeft, TooLong::TruncateRight] {
                let config = DataConfig {
                    max_length, too_long, on_empty: OnEmpty::Drop, require_stop: false, ..DataConfig::default()
                };
                let Ok(checked) = preference_preflight(&rows(&contents), &CHARACTERS, &config) else { continue };
                for group in &checked.groups {
                    let [one, other] = &group.group.completions[..] else { panic!("a pair") };
                    prop_assert!(one.token_ids != other.token_ids && !one.token_ids.is_empty());
                    prop_assert!(group.group.longest_sequence() <= max_length);
                }
                let counts = &checked.summary.sources[0].counts;
                prop_assert_eq!(counts.rows, counts.kept + counts.dropped_long + counts.dropped_empty);
            }
        }
    }
}
