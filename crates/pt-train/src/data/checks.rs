//! The pre-flight: what a data set will train, known before the first step.
//!
//! Faults that would train silently to nothing are refused or dropped with a count, as [`DataConfig`] says;
//! everything that was done to the rows stands in the [`PreflightSummary`].

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;

use pt_model::{Completion, PromptGroup};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::groups::{DataConfig, Fit, OnEmpty, TooLong, fit, row_to_group};
use super::{Encode, Message, Row};
use crate::error::{Origin, Result, TrainError};

/// Counts of one source. Lengths are in tokens, of the rows that are kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceSummary {
    /// Name of the source.
    pub name: String,
    /// Rows read.
    pub rows: usize,
    /// Rows that will be trained.
    pub kept: usize,
    /// Rows longer than the limit, whatever became of them.
    pub over_long: usize,
    /// Rows cut to the limit, and kept.
    pub truncated: usize,
    /// Rows left out because of their length.
    pub dropped_long: usize,
    /// Kept rows whose cut took away the token that ends the turn.
    #[serde(default)]
    pub stop_cut: usize,
    /// Rows left out because nothing in them would be trained, as they came or once cut to the limit.
    pub dropped_empty: usize,
    /// Rows whose tokens equal those of an earlier row, in any source.
    pub duplicates: usize,
    /// Rows left out as duplicates.
    pub dropped_duplicates: usize,
    /// Kept rows that train a token that ends a turn.
    pub stop_trained: usize,
    /// Kept rows with a plain prompt, where the model has a chat template that would render a conversation.
    #[serde(default)]
    pub untemplated: usize,
    /// Tokens of all kept rows.
    pub tokens: usize,
    /// Trained tokens of all kept rows.
    pub labels: usize,
    /// Shortest kept row.
    pub length_min: usize,
    /// Half of the kept rows are no longer than this.
    pub length_median: usize,
    /// 95 % of the kept rows are no longer than this.
    pub length_p95: usize,
    /// Longest kept row.
    pub length_max: usize,
}

/// What the pre-flight found, for the report and for machines.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreflightSummary {
    /// The limit that was applied, in tokens.
    pub max_length: usize,
    /// One entry a source, in the order of reading.
    pub sources: Vec<SourceSummary>,
    /// Things worth a look that do not stop a run.
    pub warnings: Vec<String>,
}

impl PreflightSummary {
    /// Rows that will be trained.
    pub fn kept(&self) -> usize {
        self.sources.iter().map(|source| source.kept).sum()
    }

    /// Tokens that will be trained in one epoch.
    pub fn labels(&self) -> usize {
        self.sources.iter().map(|source| source.labels).sum()
    }

    /// A table for a terminal, one line a source, then the warnings.
    pub fn to_text(&self) -> String {
        let width = self.sources.iter().map(|source| source.name.chars().count()).max().unwrap_or(0).max(6);
        let mut text = format!(
            "{:width$} {:>7} {:>7} {:>6} {:>6} {:>6} {:>6} {:>10} {:>10}  length min/median/p95/max\n",
            "source", "rows", "kept", "long", "cut", "empty", "twice", "tokens", "trained"
        );
        for source in &self.sources {
            let _ = writeln!(
                text,
                "{:width$} {:>7} {:>7} {:>6} {:>6} {:>6} {:>6} {:>10} {:>10}  {}/{}/{}/{}",
                source.name,
                source.rows,
                source.kept,
                source.over_long,
                source.truncated,
                source.dropped_empty,
                source.duplicates,
                source.tokens,
                source.labels,
                source.length_min,
                source.length_median,
                source.length_p95,
                source.length_max,
            );
        }
        for warning in &self.warnings {
            let _ = writeln!(text, "warning: {warning}");
        }
        text
    }
}

/// A checked data set.
#[derive(Clone, Debug)]
pub struct Preflight {
    /// The groups to train, in the order of their rows.
    pub groups: Vec<PromptGroup>,
    /// For each group, its row in the input.
    pub row_of_group: Vec<usize>,
    /// Counts.
    pub summary: PreflightSummary,
}

impl Preflight {
    /// The first kept group of each source, rendered by [`render_example`] under a heading.
    pub fn examples(&self, rows: &[Row], encoder: &dyn Encode, colour: bool) -> Vec<String> {
        first_of_sources(&self.groups, &self.row_of_group, rows, colour, |group| render_example(group, encoder, colour))
    }
}

/// The first item of each source, rendered under a heading.
pub(super) fn first_of_sources<T: Examined>(
    items: &[T],
    row_of_item: &[usize],
    rows: &[Row],
    colour: bool,
    render: impl Fn(&T) -> String,
) -> Vec<String> {
    let mut seen = HashSet::new();
    let mut examples = Vec::new();
    for (item, &row) in items.iter().zip(row_of_item) {
        let Some(row) = rows.get(row) else { continue };
        if seen.insert(row.source.as_str()) {
            let (tokens, labels) = (item.group().num_tokens(), item.group().num_labels());
            let title = format!("{} ({}): {tokens} tokens, {labels} trained", row.source, row.origin);
            let title = if colour { format!("\x1b[1m{title}\x1b[0m") } else { title };
            examples.push(format!("{title}\n{}", render(item)));
        }
    }
    examples
}

/// Tokenizes all rows and checks them.
///
/// # Errors
/// Those of [`row_to_group`]; [`TrainError::TooLong`] and [`TrainError::NothingTrained`] under the policies
/// `refuse`; [`TrainError::AllDropped`]; [`TrainError::StopNotTrained`] where `require_stop` is set and no kept
/// row of a source trains a stop token.
pub fn preflight(rows: &[Row], encoder: &dyn Encode, config: &DataConfig) -> Result<Preflight> {
    let sieved = sieve::<PromptGroup>(rows, encoder, config)?;
    let sources: Vec<SourceSummary> = sieved.tallies.into_iter().map(Tally::finish).collect();
    let warnings = sources
        .iter()
        .flat_map(|source| {
            let mut found = warnings(source, config);
            if source.dropped_empty > 0 && source.kept > 0 {
                let count = source.dropped_empty;
                found.push(format!("{}: {count} rows have nothing to train and are left out", source.name));
            }
            found
        })
        .collect();
    let summary = PreflightSummary { max_length: config.max_length, sources, warnings };
    Ok(Preflight { groups: sieved.items, row_of_group: sieved.row_of_item, summary })
}

/// What a row becomes, as far as the checks of all kinds of training go.
pub(super) trait Examined: Sized {
    /// What is said of a row that the cut to `max_length` leaves with too little.
    const EMPTIED: &'static str;
    /// Tokenizes a row.
    fn read(row: &Row, encoder: &dyn Encode, config: &DataConfig) -> Result<Self>;
    /// Its tokens.
    fn group(&self) -> &PromptGroup;
    /// Its tokens, to be cut.
    fn group_mut(&mut self) -> &mut PromptGroup;
    /// Why it would train nothing, if so.
    fn fault(&self) -> Option<&'static str>;
    /// What besides its tokens makes it another than an earlier row.
    fn mark(&self) -> String {
        String::new()
    }
}

impl Examined for PromptGroup {
    const EMPTIED: &'static str = "nothing in this row would be trained";

    fn read(row: &Row, encoder: &dyn Encode, config: &DataConfig) -> Result<Self> {
        row_to_group(row, encoder, config.train_turns)
    }

    fn group(&self) -> &PromptGroup {
        self
    }

    fn group_mut(&mut self) -> &mut PromptGroup {
        self
    }

    fn fault(&self) -> Option<&'static str> {
        (self.num_labels() == 0)
            .then_some("nothing in this row would be trained: no assistant turn, or an empty completion")
    }
}

/// Rows that passed, and counts of those that did not.
pub(super) struct Sieved<T> {
    pub(super) items: Vec<T>,
    /// For each item, its row in the input.
    pub(super) row_of_item: Vec<usize>,
    /// For each item, its source among the tallies.
    pub(super) source_of_item: Vec<usize>,
    pub(super) tallies: Vec<Tally>,
}

/// Tokenizes rows, applies the policies, and counts; the errors are those of [`preflight`].
pub(super) fn sieve<T: Examined>(rows: &[Row], encoder: &dyn Encode, config: &DataConfig) -> Result<Sieved<T>> {
    let mut tallies: Vec<Tally> = Vec::new();
    let mut index_of: BTreeMap<&str, usize> = BTreeMap::new();
    let mut seen = HashSet::new();
    let mut empty: Vec<(String, Fault)> = Vec::new();
    let mut long = Fault::default();
    let (mut items, mut row_of_item, mut source_of_item) = (Vec::new(), Vec::new(), Vec::new());
    let rendering = Rendering::of(encoder);
    for (row_index, row) in rows.iter().enumerate() {
        let at = *index_of.entry(&row.source).or_insert_with(|| {
            tallies.push(Tally::new(&row.source));
            tallies.len() - 1
        });
        let tally = &mut tallies[at];
        tally.counts.rows += 1;
        let mut item = T::read(row, encoder, config)?;
        if let Some(why) = item.fault() {
            tally.leave_out(why.into(), row, &mut empty);
            continue;
        }
        let is_duplicate = !seen.insert((fingerprint(item.group()), item.mark()));
        tally.counts.duplicates += usize::from(is_duplicate);
        if is_duplicate && config.drop_duplicates {
            tally.counts.dropped_duplicates += 1;
            continue;
        }
        let length = item.group().longest_sequence();
        let had_stop = trains_stop(item.group(), encoder.stop_ids());
        let fitted = fit(std::mem::take(item.group_mut()), config.max_length, config.too_long);
        tally.counts.over_long += usize::from(!matches!(fitted, Fit::Whole(_)));
        let is_cut = matches!(fitted, Fit::Cut(_));
        match fitted {
            Fit::Whole(group) | Fit::Cut(group) => *item.group_mut() = group,
            Fit::Dropped => {
                tally.counts.dropped_long += 1;
                long.note(&row.origin, length);
                continue;
            }
            Fit::Emptied => {
                tally.leave_out(format!("cut to data.max_length, {}", T::EMPTIED), row, &mut empty);
                continue;
            }
        }
        if let Some(why) = item.fault().filter(|_| is_cut) {
            tally.leave_out(format!("cut to data.max_length, {why}"), row, &mut empty);
            continue;
        }
        let counts = &mut tally.counts;
        counts.truncated += usize::from(is_cut);
        let has_stop = trains_stop(item.group(), encoder.stop_ids());
        counts.stop_trained += usize::from(has_stop);
        counts.stop_cut += usize::from(had_stop && !has_stop);
        counts.untemplated += usize::from(row.content.plain_prompt().is_some_and(|text| rendering.is_missing_in(text)));
        counts.labels += item.group().num_labels();
        tally.lengths.push(item.group().num_tokens());
        items.push(item);
        row_of_item.push(row_index);
        source_of_item.push(at);
    }
    for (why, fault) in &empty {
        if let (Some((origin, _)), OnEmpty::Refuse) = (&fault.first, config.on_empty) {
            return Err(TrainError::NothingTrained { origin: origin.clone(), why: why.clone(), count: fault.count });
        }
    }
    if let (Some((origin, found)), TooLong::Refuse) = (&long.first, config.too_long) {
        let (origin, found, max_length) = (origin.clone(), *found, config.max_length);
        return Err(TrainError::TooLong { origin, found, max_length, count: long.count });
    }
    if items.is_empty() {
        let nothing: usize = empty.iter().map(|(_, fault)| fault.count).sum();
        let reasons =
            format!("{} too long for {} tokens, {nothing} with nothing to train", long.count, config.max_length);
        return Err(TrainError::AllDropped { rows: rows.len(), reasons });
    }
    let endless = |tally: &&Tally| config.require_stop && !tally.lengths.is_empty() && tally.counts.stop_trained == 0;
    if let Some(tally) = tallies.iter().find(endless) {
        let (source_name, rows, stop_ids) =
            (tally.counts.name.clone(), tally.lengths.len(), encoder.stop_ids().to_vec());
        return Err(TrainError::StopNotTrained { source_name, rows, stop_ids });
    }
    Ok(Sieved { items, row_of_item, source_of_item, tallies })
}

/// What a chat template puts between a user's turn and the answer: a prompt without it was never rendered.
#[derive(Clone, Debug)]
pub struct Rendering(Option<String>);

impl Rendering {
    /// The mark of the encoder's template; a model without one has no mark, and nothing is missing.
    pub fn of(encoder: &dyn Encode) -> Self {
        const TEXT: &str = "a question";
        let rendered = encoder.render(&[Message::new("user", TEXT)], None, true).ok();
        let mark = rendered.as_deref().and_then(|text| text.rsplit_once(TEXT)).map(|(_, after)| after.trim());
        Self(mark.filter(|mark| !mark.is_empty()).map(str::to_owned))
    }

    /// Whether `prompt` is bare text, though the model is asked through its template.
    pub fn is_missing_in(&self, prompt: &str) -> bool {
        self.0.as_ref().is_some_and(|mark| !prompt.contains(mark))
    }
}

/// How many groups of `held_out` also stand in `train`, token for token: a leak when it is not 0.
pub fn overlap(train: &[PromptGroup], held_out: &[PromptGroup]) -> usize {
    let seen: HashSet<_> = train.iter().map(fingerprint).collect();
    held_out.iter().filter(|group| seen.contains(&fingerprint(group))).count()
}

/// A group's text with its roles marked: context dim, trained tokens green, stop tokens on a yellow ground.
///
/// Without colour, `[[` and `]]` stand round what is trained and `{{` and `}}` round a trained stop token.
pub fn render_example(group: &PromptGroup, encoder: &dyn Encode, colour: bool) -> String {
    let completions: Vec<&Completion> = group.completions.iter().collect();
    render_tokens(&group.prompt, &completions, encoder, colour)
}

/// As [`render_example`], of context and what follows it.
pub(super) fn render_tokens(
    context: &[i64],
    completions: &[&Completion],
    encoder: &dyn Encode,
    colour: bool,
) -> String {
    #[derive(Clone, Copy, PartialEq)]
    enum Part {
        Context,
        Trained,
        Stop,
    }
    let mut tokens: Vec<(i64, Part)> = context.iter().map(|&id| (id, Part::Context)).collect();
    for completion in completions {
        for (&id, &is_label) in completion.token_ids.iter().zip(&completion.is_label) {
            let part = match is_label {
                true if encoder.stop_ids().contains(&id) => Part::Stop,
                true => Part::Trained,
                false => Part::Context,
            };
            tokens.push((id, part));
        }
    }
    let mut text = String::new();
    for run in tokens.chunk_by(|one, next| one.1 == next.1) {
        let ids: Vec<i64> = run.iter().map(|(id, _)| *id).collect();
        // Control characters in data must not reach a terminal; a trained newline is made visible.
        let clean: String =
            encoder.decode(&ids).chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect();
        let (open, close) = match (run[0].1, colour) {
            (Part::Context, true) => ("\x1b[2m", "\x1b[0m"),
            (Part::Trained, true) => ("\x1b[32m", "\x1b[0m"),
            (Part::Stop, true) => ("\x1b[1;30;43m", "\x1b[0m"),
            (Part::Context, false) => ("", ""),
            (Part::Trained, false) => ("[[", "]]"),
            (Part::Stop, false) => ("{{", "}}"),
        };
        let shown = if run[0].1 == Part::Context { clean } else { clean.replace('\n', "\u{21b5}\n") };
        text.push_str(open);
        text.push_str(&shown);
        text.push_str(close);
    }
    if !text.ends_with('\n') {
        text.push('\n');
    }
    text
}

fn trains_stop(group: &PromptGroup, stop_ids: &[i64]) -> bool {
    group.completions.iter().all(|completion| {
        completion.token_ids.iter().zip(&completion.is_label).any(|(id, &is_label)| is_label && stop_ids.contains(id))
    })
}

fn fingerprint(group: &PromptGroup) -> [u8; 32] {
    let mut hasher = Sha256::new();
    let mut part = |ids: &[i64]| {
        hasher.update(ids.len().to_le_bytes());
        ids.iter().for_each(|id| hasher.update(id.to_le_bytes()));
    };
    part(&group.prompt);
    group.completions.iter().for_each(|completion| part(&completion.token_ids));
    hasher.finalize().into()
}

/// What is worth a look in the counts of any kind of training.
pub(super) fn warnings(source: &SourceSummary, config: &DataConfig) -> Vec<String> {
    let name = &source.name;
    let mut found = Vec::new();
    let percent = |count: usize| 100.0 * count as f64 / source.rows.max(1) as f64;
    if source.kept == 0 {
        found.push(format!("{name}: no row is left"));
        return found;
    }
    if source.dropped_long > 0 {
        let (count, max_length) = (source.dropped_long, config.max_length);
        found.push(format!(
            "{name}: {count} rows ({:.1} %) are longer than {max_length} tokens and left out",
            percent(count)
        ));
    }
    if source.truncated > 0 {
        found.push(format!(
            "{name}: {} rows ({:.1} %) are cut to {} tokens",
            source.truncated,
            percent(source.truncated),
            config.max_length
        ));
    }
    if source.duplicates > 0 {
        let fate = if config.drop_duplicates { "and left out" } else { "and kept" };
        found.push(format!("{name}: {} rows are duplicates {fate}", source.duplicates));
    }
    if source.stop_cut > 0 {
        found.push(format!(
            "{name}: {} rows ({:.1} %) lost their end of turn when they were cut, so they do not teach to stop",
            source.stop_cut,
            percent(source.stop_cut)
        ));
    }
    let endless = source.kept - source.stop_trained - source.stop_cut;
    if endless > 0 {
        found.push(format!("{name}: {endless} rows train no stop token"));
    }
    if source.untemplated > 0 {
        found.push(format!(
            "{name}: {} prompts are plain text, trained without the chat template that `pt chat` and \
             `pt generate --prompt` ask through; to train what those ask: --set data.as_chat=true, or messages in `prompt`",
            source.untemplated
        ));
    }
    found
}

/// The least of the sorted values that `part` of them do not exceed; 0 of none.
pub(super) fn quantile(sorted: &[usize], part: f64) -> usize {
    sorted.get(((sorted.len() as f64 * part).ceil() as usize).saturating_sub(1)).copied().unwrap_or(0)
}

/// A fault that several rows may share: the first place, and how many.
#[derive(Default)]
struct Fault {
    first: Option<(Origin, usize)>,
    count: usize,
}

impl Fault {
    fn note(&mut self, origin: &Origin, length: usize) {
        self.first.get_or_insert_with(|| (origin.clone(), length));
        self.count += 1;
    }
}

pub(super) struct Tally {
    counts: SourceSummary,
    lengths: Vec<usize>,
    /// Rows left out with nothing to train, by reason.
    pub(super) left_out: BTreeMap<String, usize>,
}

impl Tally {
    fn new(name: &str) -> Self {
        let counts = SourceSummary { name: name.to_owned(), ..SourceSummary::default() };
        Self { counts, lengths: Vec::new(), left_out: BTreeMap::new() }
    }

    fn leave_out(&mut self, why: String, row: &Row, faults: &mut Vec<(String, Fault)>) {
        self.counts.dropped_empty += 1;
        *self.left_out.entry(why.clone()).or_default() += 1;
        let known = faults.iter().position(|(reason, _)| *reason == why);
        let at = known.unwrap_or_else(|| {
            faults.push((why, Fault::default()));
            faults.len() - 1
        });
        faults[at].1.note(&row.origin, 0);
    }

    pub(super) fn finish(mut self) -> SourceSummary {
        self.lengths.sort_unstable();
        let quantile = |part: f64| quantile(&self.lengths, part);
        self.counts.kept = self.lengths.len();
        self.counts.tokens = self.lengths.iter().sum();
        self.counts.length_min = quantile(0.0);
        self.counts.length_median = quantile(0.5);
        self.counts.length_p95 = quantile(0.95);
        self.counts.length_max = quantile(1.0);
        self.counts
    }
}

#[cfg(test)]
mod tests {
    use super::super::RowContent;
    use super::super::groups::testing::*;
    use super::*;

    fn rows(contents: &[RowContent]) -> Vec<Row> {
        contents.iter().enumerate().map(|(index, content)| row(content.clone(), index + 1)).collect()
    }

    #[test]
    fn counts_say_what_became_of_each_row() {
        let rows = rows(&[plain("ab", "cd"), plain("ab", "cd"), plain("abcdefghij", "k"), plain("a", "")]);
        let config = DataConfig { max_length: 8, on_empty: OnEmpty::Drop, ..DataConfig::default() };
        let checked = preflight(&rows, &CHARACTERS, &config).expect("two rows are good");
        let source = &checked.summary.sources[0];
        assert_eq!((source.rows, source.kept, source.duplicates), (4, 2, 1));
        assert_eq!((source.over_long, source.dropped_long, source.dropped_empty), (1, 1, 1));
        assert_eq!((source.tokens, source.labels, source.stop_trained), (10, 6, 2));
        assert_eq!((source.length_min, source.length_median, source.length_max), (5, 5, 5));
        assert_eq!(checked.row_of_group, [0, 1]);
        assert_eq!((checked.summary.warnings.len(), source.untemplated), (4, 2));
        assert_eq!(overlap(&checked.groups[..1], &checked.groups[1..]), 1);
        let config = DataConfig { drop_duplicates: true, too_long: TooLong::TruncateLeft, ..config };
        let checked = preflight(&rows, &CHARACTERS, &config).expect("good");
        assert_eq!(checked.row_of_group, [0, 2]);
        assert_eq!(checked.summary.sources[0].truncated, 1);
        let json = serde_json::to_string(&checked.summary).expect("serialises");
        assert_eq!(serde_json::from_str::<PreflightSummary>(&json).expect("parses"), checked.summary);
    }

    #[test]
    fn silent_faults_are_refused_by_default() {
        let config = DataConfig { max_length: 8, ..DataConfig::default() };
        let check = |contents: &[RowContent], config: &DataConfig| {
            preflight(&rows(contents), &CHARACTERS, config).expect_err("refused")
        };
        let error = check(&[plain("ab", "cd"), plain("a", ""), chat(&[("user", "x")])], &config);
        assert!(matches!(error, TrainError::NothingTrained { count: 2, .. }), "{error}");
        assert!(error.to_string().starts_with("rows.jsonl:2: nothing in this row would be trained"));
        let error = check(&[plain("abcdefghij", "k")], &config);
        assert!(matches!(error, TrainError::AllDropped { rows: 1, .. }), "{error}");
        let error = check(&[plain("abcdefghij", "k")], &DataConfig { too_long: TooLong::Refuse, ..config });
        assert!(matches!(error, TrainError::TooLong { found: 12, max_length: 8, count: 1, .. }), "{error}");
    }

    #[test]
    fn plain_prompts_of_a_model_with_a_template_are_told() {
        let is_told = |content: RowContent| {
            let checked = preflight(&rows(&[content]), &CHARACTERS, &DataConfig::default()).expect("good");
            checked.summary.warnings.iter().any(|text| text.contains("1 prompts are plain text"))
        };
        assert!(is_told(plain("ab", "cd")));
        // Rendered by hand already, or to be rendered.
        assert!(!is_told(plain("<u|ab$\n<a|", "cd")));
        assert!(!is_told(chat(&[("user", "ab"), ("assistant", "cd")])));
    }

    #[test]
    fn a_row_that_truncation_empties_is_refused_or_counted() {
        // The second row's completion begins past the limit, the third's is longer than it.
        let rows = rows(&[plain("ab", "cd"), plain("abcdefghij", "k"), plain("a", "bcdefghijk")]);
        for (too_long, emptied) in [(TooLong::TruncateRight, 2), (TooLong::TruncateLeft, 3)] {
            let config = DataConfig { max_length: 8, too_long, ..DataConfig::default() };
            let error = preflight(&rows, &CHARACTERS, &config).expect_err("a row is emptied");
            assert!(matches!(error, TrainError::NothingTrained { count: 1, .. }), "{error}");
            let place = format!("rows.jsonl:{emptied}: cut to data.max_length");
            assert!(error.to_string().starts_with(&place), "{error}");
            let config = DataConfig { on_empty: OnEmpty::Drop, ..config };
            let summary = preflight(&rows, &CHARACTERS, &config).expect("asked for").summary;
            let source = &summary.sources[0];
            assert_eq!((source.kept, source.dropped_empty, source.dropped_long), (2, 1, 0));
            assert_eq!((source.over_long, source.truncated), (2, 1));
        }
    }

    #[test]
    fn rows_that_lose_their_end_of_turn_are_counted_in_a_warning() {
        let rows = rows(&[plain("ab", "cd"), plain("ab", "cdefgh"), plain("ab", "ijklmn")]);
        let config = DataConfig { max_length: 6, too_long: TooLong::TruncateRight, ..DataConfig::default() };
        let summary = preflight(&rows, &CHARACTERS, &config).expect("one row keeps its stop").summary;
        assert_eq!((summary.sources[0].stop_trained, summary.sources[0].stop_cut), (1, 2));
        let warning = "rows: 2 rows (66.7 %) lost their end of turn when they were cut, so they do not teach to stop";
        assert_eq!(summary.warnings[1], warning);
        let error = preflight(&rows[1..], &CHARACTERS, &config).expect_err("none keeps it");
        assert!(matches!(error, TrainError::StopNotTrained { rows: 2, .. }), "{error}");
    }

    #[test]
    fn a_template_that_never_ends_a_turn_is_refused() {
        let template = Characters { rewrites: false, endless: true };
        let rows = rows(&[chat(&[("user", "q"), ("assistant", "a")])]);
        let error = preflight(&rows, &template, &DataConfig::default()).expect_err("no stop");
        assert!(matches!(error, TrainError::StopNotTrained { rows: 1, .. }), "{error}");
        let config = DataConfig { require_stop: false, ..DataConfig::default() };
        let checked = preflight(&rows, &template, &config).expect("asked for");
        assert_eq!(checked.summary.warnings, ["rows: 1 rows train no stop token"]);
    }

    #[test]
    fn an_example_shows_context_trained_tokens_and_the_end() {
        let rows = rows(&[chat(&[("user", "q\u{7}"), ("assistant", "yes")])]);
        let checked = preflight(&rows, &CHARACTERS, &DataConfig::default()).expect("good");
        let plain = checked.examples(&rows, &CHARACTERS, false).concat();
        assert_eq!(plain, "rows (rows.jsonl:1): 15 tokens, 5 trained\n<u|q$\n<a|[[yes]]{{$}}[[\u{21b5}\n]]\n");
        let colour = render_example(&checked.groups[0], &CHARACTERS, true);
        assert!(colour.contains("\x1b[32myes\x1b[0m\x1b[1;30;43m$\x1b[0m"), "{colour:?}");
    }
}
