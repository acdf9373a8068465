//! Log-probs at label positions without a logits tensor.

use crate::autograd::attach_backward;
use crate::fused::{SoftmaxState, is_fusable};
use crate::{Result, TensorError};
use tch::{Kind, Tensor, no_grad};

/// Options of [`label_logprobs`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LabelLogprobs {
    /// Logits are divided by it.
    pub temperature: f64,
    /// Gemma's soft cap c: logits become c · tanh(logits / c) before the temperature.
    pub soft_cap: Option<f64>,
    /// Also return the entropy of each distribution.
    pub with_entropy: bool,
    /// Also return log Σ p² of each distribution.
    pub with_collision: bool,
    /// Tokens in a tile.
    pub token_tile: i64,
    /// Vocabulary entries in a tile. A tile of logits takes `4 · token_tile · vocab_tile` bytes.
    pub vocab_tile: i64,
}

impl Default for LabelLogprobs {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            soft_cap: None,
            with_entropy: false,
            with_collision: false,
            token_tile: 512,
            vocab_tile: 8192,
        }
    }
}

/// What [`label_logprobs`] returns, each `[num_labels]` f32 (f64 for f64 input).
#[derive(Debug)]
pub struct LabelOutput {
    /// log p(label), nats; differentiable.
    pub logprobs: Tensor,
    /// Entropy in nats; differentiable; `None` unless asked for.
    pub entropy: Option<Tensor>,
    /// log Σ p² over the vocabulary, nats: the log of how probable it is that two draws are the same token (minus the
    /// Rényi entropy of order 2), which WPO weighs tokens by. No gradient; `None` unless asked for.
    pub log_collision: Option<Tensor>,
    /// 1 where the label is the most probable token, else 0; no gradient.
    pub is_top1: Tensor,
}

/// Log-probs of labels under softmax(f(hidden_states · weightᵀ)), in tiles over tokens and vocabulary.
///
/// The normaliser is an online log-sum-exp in f32, so `[num_labels, vocab_size]` never exists. Where only
/// `hidden_states` needs a gradient (a frozen output weight, the common case of adapters), the forward pass also
/// accumulates E\[weight\] under the distribution, and the backward pass is a multiplication: the vocabulary is
/// passed over once for values and gradients together. Otherwise the tiles are computed again in the backward
/// pass, and both gradients accumulate in f32.
///
/// # Shapes and units
/// - `hidden_states`: `[num_labels, hidden_size]`, the states that predict;
/// - `weight`: `[vocab_size, hidden_size]`, tied or separate;
/// - `label_ids`: `[num_labels]`, i64, in `0..vocab_size`.
///
/// # Errors
/// [`TensorError::Shape`] and [`TensorError::Argument`] for inputs that do not fit, a label out of range included.
pub fn label_logprobs(
    hidden_states: &Tensor,
    weight: &Tensor,
    label_ids: &Tensor,
    options: &LabelLogprobs,
) -> Result<LabelOutput> {
    let (num_labels, hidden_size) = hidden_states
        .size2()
        .map_err(|_| TensorError::shape("hidden_states", hidden_states, "[num_labels, hidden_size]"))?;
    let vocab_size = match weight.size()[..] {
        [vocab_size, width] if width == hidden_size => vocab_size,
        _ => return Err(TensorError::shape("weight", weight, format!("[vocab_size, {hidden_size}]"))),
    };
    if label_ids.size() != [num_labels] || label_ids.kind() != Kind::Int64 {
        return Err(TensorError::shape("label_ids", label_ids, format!("[{num_labels}] of i64")));
    }
    if !(options.temperature > 0.0 && options.temperature.is_finite()) {
        return Err(TensorError::argument("temperature", options.temperature, "a positive number"));
    }
    if options.soft_cap.is_some_and(|cap| cap.is_nan() || cap <= 0.0) {
        return Err(TensorError::argument("soft_cap", format!("{:?}", options.soft_cap), "a positive number"));
    }
    if options.token_tile < 1 || options.vocab_tile < 1 {
        return Err(TensorError::argument(
            "tile",
            format!("{} x {}", options.token_tile, options.vocab_tile),
            "at least 1 x 1",
        ));
    }
    if num_labels > 0 {
        let (low, high) = (label_ids.min().int64_value(&[]), label_ids.max().int64_value(&[]));
        if low < 0 || high >= vocab_size {
            return Err(TensorError::argument(
                "label_ids",
                format!("{low}..={high}"),
                &format!("ids in 0..{vocab_size}"),
            ));
        }
    }
    let wants_hidden = hidden_states.requires_grad();
    let wants_weight = weight.requires_grad();
    // The shortcut: d log p / d hidden needs nothing from upstream but one factor per row.
    let is_one_pass = wants_hidden && !wants_weight && !options.with_entropy;
    let tiles = Tiles {
        hidden: hidden_states.detach(),
        weight: weight.detach(),
        labels: label_ids.shallow_clone(),
        options: *options,
    };
    let pass = no_grad(|| tiles.forward(is_one_pass))?;

    // max and log(sum) stay apart: their sum would round away what a log-prob of a few nats needs when logits are large.
    let label_logits = &pass.label_logits - &pass.max;
    let logprobs = &label_logits - &pass.log_sum;
    let is_top1 = label_logits.ge(0.0).to_kind(accumulate_kind(hidden_states));
    let entropy = options.with_entropy.then(|| &pass.log_sum - &pass.expected_logit);
    let log_collision = options.with_collision.then(|| &pass.log_sum_squares - &pass.log_sum * 2.0);
    if let Some(direction) = pass.direction {
        attach_backward("label_logprobs", &[hidden_states], &[&logprobs], move |grads| {
            Ok(vec![
                grads[0].as_ref().map(|g| (direction.to_kind(g.kind()) * g.unsqueeze(1)).to_kind(direction.kind())),
            ])
        })?;
    } else if wants_hidden || wants_weight {
        let (max, log_sum, others_share) = (pass.max, pass.log_sum, pass.others_share);
        let saved_entropy = entropy.as_ref().map(Tensor::copy);
        let outputs: Vec<&Tensor> = std::iter::once(&logprobs).chain(&entropy).collect();
        attach_backward("label_logprobs", &[hidden_states, weight], &outputs, move |grads| {
            let grad_entropy = grads.get(1).and_then(Option::as_ref);
            tiles.backward(
                (&max, &log_sum, &others_share),
                grads[0].as_ref(),
                grad_entropy.zip(saved_entropy.as_ref()),
                wants_hidden,
                wants_weight,
            )
        })?;
    }
    Ok(LabelOutput { logprobs, entropy, log_collision, is_top1 })
}

/// f32, or f64 for f64 input (finite differences in tests).
fn accumulate_kind(tensor: &Tensor) -> Kind {
    if tensor.kind() == Kind::Double { Kind::Double } else { Kind::Float }
}

struct Tiles {
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    options: LabelLogprobs,
}

/// Per label, in the accumulation kind: `[num_labels]`, but for `direction`.
struct Forward {
    label_logits: Tensor,
    max: Tensor,
    /// log Σ exp(logit − max).
    log_sum: Tensor,
    /// 1 − p(label), which a subtraction would round away for a confident label.
    others_share: Tensor,
    /// Σ p · (logit − max), for the entropy.
    expected_logit: Tensor,
    /// log Σ exp(logit − max)², where it is asked for.
    log_sum_squares: Tensor,
    /// d log p / d hidden, `[num_labels, hidden_size]`, in the kind of `hidden`.
    direction: Option<Tensor>,
}

impl Tiles {
    /// Final logits of a tile, and d final / d raw where the soft cap makes it differ from a constant.
    fn logits(&self, hidden: &Tensor, weight: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        let raw = hidden.f_linear(weight, None::<Tensor>)?.to_kind(accumulate_kind(hidden));
        let mut slope = None;
        let mut logits = match self.options.soft_cap {
            None => raw,
            Some(cap) => {
                let tanh = (raw / cap).tanh();
                slope = Some(1.0 - tanh.square());
                tanh * cap
            }
        };
        if self.options.temperature != 1.0 {
            let _ = logits.g_mul_scalar_(1.0 / self.options.temperature);
        }
        Ok((logits, slope))
    }

    fn token_tiles(&self) -> impl Iterator<Item = (i64, i64)> + use<> {
        tiles(self.hidden.size()[0], self.options.token_tile)
    }

    fn vocab_tiles(&self) -> impl Iterator<Item = (i64, i64)> + use<> {
        tiles(self.weight.size()[0], self.options.vocab_tile)
    }

    fn forward(&self, with_direction: bool) -> Result<Forward> {
        let kind = accumulate_kind(&self.hidden);
        let device = self.hidden.device();
        let num_labels = self.hidden.size()[0];
        let column = || Tensor::zeros([num_labels], (kind, device));
        let (label_logits, max, log_sum) = (column(), column(), column());
        let (others_share, expected_logit, log_sum_squares) = (column(), column(), column());
        let direction = with_direction.then(|| self.hidden.empty_like());
        for (start, len) in self.token_tiles() {
            let hidden = self.hidden.narrow(0, start, len);
            let labels = self.labels.narrow(0, start, len);
            // The label's own logit comes out of the tiles too, so that it carries the same rounding as the sum.
            let mut state = SoftmaxState::new(len, kind, device);
            let label_slope = Tensor::ones([len, 1], (kind, device));
            let mut weighted = Tensor::zeros([len], (kind, device));
            let mut others_weight =
                direction.as_ref().map(|_| Tensor::zeros([len, self.hidden.size()[1]], (kind, device)));
            for (first, count) in self.vocab_tiles() {
                let weight = self.weight.narrow(0, first, count);
                let (p, rescale) = if self.is_fused() {
                    let logits = hidden.f_linear(&weight, None::<Tensor>)?.contiguous();
                    let rescale = state.take_in(&logits, 1.0 / self.options.temperature, &labels, first);
                    (logits, rescale)
                } else {
                    self.softmax_tile(&hidden, &weight, &labels, first, &mut state, &mut weighted, &label_slope)?
                };
                if let Some(others_weight) = &mut others_weight {
                    let contribution = p.to_kind(weight.kind()).matmul(&weight);
                    let _ = others_weight.g_mul_(&rescale.unsqueeze(1));
                    let _ = others_weight.g_add_(&contribution.to_kind(kind));
                }
            }
            let own = &state.label_logits - &state.max;
            let total = &state.others + own.exp();
            max.narrow(0, start, len).copy_(&state.max);
            log_sum.narrow(0, start, len).copy_(&total.log());
            label_logits.narrow(0, start, len).copy_(&state.label_logits);
            if self.options.with_collision {
                log_sum_squares.narrow(0, start, len).copy_(&(&state.squares + own.exp().square()).log());
            }
            let share = &state.others / &total;
            others_share.narrow(0, start, len).copy_(&share);
            if self.options.with_entropy {
                expected_logit.narrow(0, start, len).copy_(&((weighted + own.exp() * own) / &total));
            }
            if let (Some(direction), Some(others_weight)) = (&direction, others_weight) {
                // W[label] − E[W] with the label's own share taken out of both: for a confident label the two would
                // be equal up to the rounding of bf16, and their difference noise.
                let own = self.weight.index_select(0, &labels).to_kind(kind) * &label_slope;
                let value = (own * share.unsqueeze(1) - others_weight / total.unsqueeze(1)) / self.options.temperature;
                direction.narrow(0, start, len).copy_(&value);
            }
        }
        Ok(Forward { label_logits, max, log_sum, others_share, expected_logit, log_sum_squares, direction })
    }

    /// Whether tiles can be taken in by [`SoftmaxState::take_in`].
    fn is_fused(&self) -> bool {
        is_fusable(&[&self.hidden, &self.weight]) && self.options.soft_cap.is_none() && !self.options.with_entropy
    }

    /// [`SoftmaxState::take_in`] in libtorch's operations, for every device, kind and option: returns
    /// exp(logit − max) times the soft cap's slope, the label's entry 0, and the factor for earlier sums.
    #[allow(clippy::too_many_arguments)]
    fn softmax_tile(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        labels: &Tensor,
        first: i64,
        state: &mut SoftmaxState,
        weighted: &mut Tensor,
        label_slope: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let kind = accumulate_kind(&self.hidden);
        let count = weight.size()[0];
        let (mut logits, slope) = self.logits(hidden, weight)?;
        // Labels outside the tile read a clamped entry and are masked out.
        let local = (labels - first).clamp(0, count - 1).unsqueeze(1);
        let is_here = labels.ge(first).logical_and(&labels.lt(first + count)).unsqueeze(1);
        let here = |values: &Tensor| values.gather(1, &local, false);
        let _ = state.label_logits.g_add_(&here(&logits).where_scalarother(&is_here, 0.0).squeeze_dim(1));
        let new_max = state.max.maximum(&logits.amax([1], false));
        // Before the first tile there is no maximum and nothing to rescale.
        let step = (&state.max - &new_max).where_scalarother(&state.max.isfinite(), 0.0);
        let rescale = step.exp();
        let shifted = logits.g_sub_(&new_max.unsqueeze(1));
        let mut p = shifted.exp();
        let rest = here(&p).masked_fill(&is_here, 0.0);
        let _ = p.scatter_(1, &local, &rest);
        if self.options.with_entropy {
            let moved = (&*weighted + &state.others * step) * &rescale;
            *weighted = moved + (&p * shifted).sum_dim_intlist(1, false, kind);
        }
        if self.options.with_collision {
            state.squares = &state.squares * rescale.square() + p.square().sum_dim_intlist(1, false, kind);
        }
        state.others = &state.others * &rescale + p.sum_dim_intlist(1, false, kind);
        state.max = new_max;
        if let Some(slope) = slope {
            label_slope.shallow_clone().copy_(&here(&slope).where_self(&is_here, label_slope));
            p *= slope;
        }
        Ok((p, rescale))
    }

    /// d logprob / d logit = onehot − p; d entropy / d logit = −p · (log p + entropy).
    fn backward(
        &self,
        (max, log_sum, others_share): (&Tensor, &Tensor, &Tensor),
        grad_logprobs: Option<&Tensor>,
        entropy: Option<(&Tensor, &Tensor)>,
        wants_hidden: bool,
        wants_weight: bool,
    ) -> Result<Vec<Option<Tensor>>> {
        let kind = accumulate_kind(&self.hidden);
        let device = self.hidden.device();
        let mut grad_hidden = wants_hidden.then(|| Tensor::zeros(self.hidden.size(), (kind, device)));
        let mut grad_weight = wants_weight.then(|| Tensor::zeros(self.weight.size(), (kind, device)));
        for (start, len) in self.token_tiles() {
            let hidden = self.hidden.narrow(0, start, len);
            let labels = self.labels.narrow(0, start, len);
            let (max, log_sum) = (max.narrow(0, start, len).unsqueeze(1), log_sum.narrow(0, start, len).unsqueeze(1));
            for (first, count) in self.vocab_tiles() {
                let weight = self.weight.narrow(0, first, count);
                let (logits, slope) = self.logits(&hidden, &weight)?;
                let log_p = (logits - &max) - &log_sum;
                let p = log_p.exp();
                let mut grad = p.zeros_like();
                if let Some(upstream) = grad_logprobs {
                    let upstream = upstream.narrow(0, start, len).unsqueeze(1);
                    let is_here = labels.ge(first).logical_and(&labels.lt(first + count)).unsqueeze(1);
                    let local = (&labels - first).clamp(0, count - 1).unsqueeze(1);
                    grad = &p * -&upstream;
                    let at_label = others_share.narrow(0, start, len).unsqueeze(1) * upstream;
                    let at_label = at_label.where_self(&is_here, &grad.gather(1, &local, false));
                    let _ = grad.scatter_(1, &local, &at_label);
                }
                if let Some((upstream, entropy)) = entropy {
                    let (upstream, entropy) = (upstream.narrow(0, start, len), entropy.narrow(0, start, len));
                    grad -= p * (log_p + entropy.unsqueeze(1)) * upstream.unsqueeze(1);
                }
                if let Some(slope) = slope {
                    grad *= slope;
                }
                let grad = (grad / self.options.temperature).to_kind(self.hidden.kind());
                if let Some(total) = &mut grad_hidden {
                    let _ = total.narrow(0, start, len).g_add_(&grad.matmul(&weight).to_kind(kind));
                }
                if let Some(total) = &mut grad_weight {
                    let _ = total.narrow(0, first, count).g_add_(&grad.tr().matmul(&hidden).to_kind(kind));
                }
            }
        }
        Ok(vec![grad_hidden.map(|g| g.to_kind(self.hidden.kind())), grad_weight.map(|g| g.to_kind(self.weight.kind()))])
    }
}

/// `(start, len)` of consecutive tiles that cover `0..total`.
fn tiles(total: i64, tile: i64) -> impl Iterator<Item = (i64, i64)> {
    (0..total).step_by(tile as usize).map(move |start| (start, tile.min(total - start)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    struct Case {
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
    }

    fn case(kind: Kind) -> Case {
        let _lock = crate::random::test_lock();
        // One of the nine labels has to be a confident one, which not every draw has.
        crate::random::seed(1);
        Case {
            hidden: Tensor::randn([9, 6], (Kind::Double, Device::Cpu)).to_kind(kind),
            weight: Tensor::randn([23, 6], (Kind::Double, Device::Cpu)).to_kind(kind),
            labels: Tensor::randint(23, [9], (Kind::Int64, Device::Cpu)),
        }
    }

    /// The definition, with a whole logits tensor and libtorch's autograd.
    fn naive(case: &Case, options: &LabelLogprobs) -> (Tensor, Tensor) {
        let mut logits = case.hidden.matmul(&case.weight.tr());
        if let Some(cap) = options.soft_cap {
            logits = (logits / cap).tanh() * cap;
        }
        let log_p = (logits / options.temperature).log_softmax(-1, Kind::Double);
        let entropy = -(log_p.exp() * &log_p).sum_dim_intlist(-1, false, Kind::Double);
        (log_p.gather(1, &case.labels.unsqueeze(1), false).squeeze_dim(1), entropy)
    }

    /// log Σ p² of whole rows of logits.
    fn naive_log_collision(case: &Case, options: &LabelLogprobs) -> Tensor {
        let mut logits =
            case.hidden.detach().to_kind(Kind::Double).matmul(&case.weight.detach().to_kind(Kind::Double).tr());
        if let Some(cap) = options.soft_cap {
            logits = (logits / cap).tanh() * cap;
        }
        (logits / options.temperature).softmax(-1, Kind::Double).square().sum_dim_intlist(-1, false, Kind::Double).log()
    }

    fn max_error(a: &Tensor, b: &Tensor) -> f64 {
        (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[])
    }

    #[test]
    fn values_and_gradients_equal_the_definition_at_every_tile_size() {
        for (temperature, soft_cap) in [(1.0, None), (0.7, None), (1.3, Some(2.0))] {
            for (token_tile, vocab_tile) in [(1, 1), (2, 5), (4, 23), (9, 8), (100, 100)] {
                for (with_entropy, wants_weight) in [(false, false), (false, true), (true, false), (true, true)] {
                    let options = LabelLogprobs {
                        temperature,
                        soft_cap,
                        with_entropy,
                        with_collision: true,
                        token_tile,
                        vocab_tile,
                    };
                    let mut case = case(Kind::Double);
                    case.hidden = case.hidden.set_requires_grad(true);
                    case.weight = case.weight.set_requires_grad(wants_weight);
                    let out = label_logprobs(&case.hidden, &case.weight, &case.labels, &options).unwrap();
                    let (logprobs, entropy) = naive(&case, &options);
                    assert!(max_error(&out.logprobs, &logprobs) < 1e-12);
                    let log_collision = out.log_collision.unwrap();
                    assert!(max_error(&log_collision, &naive_log_collision(&case, &options)) < 1e-12);
                    assert!(!log_collision.requires_grad());
                    let upstream = Tensor::arange(9, (Kind::Double, Device::Cpu)) - 4.0;
                    let total = |l: &Tensor, h: Option<&Tensor>| {
                        let mut sum = (l * &upstream).sum(Kind::Double);
                        if let Some(h) = h.filter(|_| with_entropy) {
                            sum += (h * &upstream * 0.3).sum(Kind::Double);
                        }
                        sum
                    };
                    total(&out.logprobs, out.entropy.as_ref()).backward();
                    let grads = (case.hidden.grad().copy(), wants_weight.then(|| case.weight.grad().copy()));
                    case.hidden.zero_grad();
                    case.weight.zero_grad();
                    total(&logprobs, Some(&entropy)).backward();
                    assert!(max_error(&grads.0, &case.hidden.grad()) < 1e-10, "{options:?}");
                    if let Some(grad) = grads.1 {
                        assert!(max_error(&grad, &case.weight.grad()) < 1e-10, "{options:?}");
                    }
                    if let Some(own) = out.entropy {
                        assert!(max_error(&own, &entropy) < 1e-12);
                    }
                }
            }
        }
    }

    #[test]
    fn gradients_equal_finite_differences() {
        let case = case(Kind::Double);
        let hidden = case.hidden.copy().set_requires_grad(true);
        let options = LabelLogprobs { soft_cap: Some(3.0), temperature: 0.8, vocab_tile: 7, ..Default::default() };
        label_logprobs(&hidden, &case.weight, &case.labels, &options).unwrap().logprobs.sum(Kind::Double).backward();
        let value = |h: &Tensor| {
            label_logprobs(h, &case.weight, &case.labels, &options)
                .unwrap()
                .logprobs
                .sum(Kind::Double)
                .double_value(&[])
        };
        for (row, column) in [(0, 0), (3, 5), (8, 2)] {
            let step = Tensor::zeros([9, 6], (Kind::Double, Device::Cpu));
            let _ = step.get(row).get(column).fill_(1e-5);
            let difference = (value(&(&case.hidden + &step)) - value(&(&case.hidden - &step))) / 2e-5;
            assert!((difference - hidden.grad().double_value(&[row, column])).abs() < 1e-8);
        }
    }

    #[test]
    fn bf16_stays_close_to_f64() {
        let mut case = case(Kind::BFloat16);
        let out = label_logprobs(&case.hidden, &case.weight, &case.labels, &LabelLogprobs::default()).unwrap();
        assert_eq!(out.logprobs.kind(), Kind::Float);
        case.hidden = case.hidden.to_kind(Kind::Double);
        case.weight = case.weight.to_kind(Kind::Double);
        assert!(max_error(&out.logprobs, &naive(&case, &LabelLogprobs::default()).0) < 0.05);
    }

    /// A confident label's gradient is small but not noise, in every kind that models train in.
    #[test]
    fn gradients_of_confident_labels_keep_their_digits() {
        let case = case(Kind::Double);
        // In bf16 the logits themselves are rounded, by several percent of a probability.
        for (kind, tolerance) in [(Kind::Float, 1e-4), (Kind::BFloat16, 8e-2)] {
            for wants_weight in [false, true] {
                // The label's own row, scaled until its probability is about 0.995.
                let round = |t: &Tensor| t.to_kind(kind).to_kind(Kind::Double);
                let weight = round(&case.weight);
                let hidden = round(&(weight.index_select(0, &case.labels) * 2.0));
                let wide = Case { hidden: hidden.copy().set_requires_grad(true), weight, labels: case.labels.copy() };
                let (want, _) = naive(&wide, &LabelLogprobs::default());
                want.sum(Kind::Double).backward();
                let own = hidden.to_kind(kind).set_requires_grad(true);
                let weight = wide.weight.detach().to_kind(kind).set_requires_grad(wants_weight);
                let options = LabelLogprobs { vocab_tile: 7, ..Default::default() };
                label_logprobs(&own, &weight, &case.labels, &options).unwrap().logprobs.sum(Kind::Float).backward();
                assert!(want.exp().max().double_value(&[]) > 0.99);
                for row in 0..9 {
                    let want = wide.hidden.grad().get(row);
                    let error = max_error(&own.grad().get(row), &want) / want.abs().max().double_value(&[]);
                    assert!(error < tolerance, "{kind:?}, two passes {wants_weight}, row {row}: {error}");
                }
            }
        }
    }

    /// Log-probs of a few nats keep seven digits where logits are several hundred.
    #[test]
    fn large_logits_cost_no_digits() {
        let weight = Tensor::from_slice(&[1f32, 0., 1., 0., 1., 0.]).view([3, 2]);
        let hidden = Tensor::from_slice(&[700f32, 1.]).view([1, 2]);
        let labels = Tensor::from_slice(&[1i64]);
        for with_entropy in [false, true] {
            let options = LabelLogprobs { with_entropy, vocab_tile: 2, ..Default::default() };
            let out = label_logprobs(&hidden, &weight, &labels, &options).unwrap();
            assert!((out.logprobs.double_value(&[0]) + 3f64.ln()).abs() < 2e-7);
            if let Some(entropy) = out.entropy {
                assert!((entropy.double_value(&[0]) - 3f64.ln()).abs() < 2e-7);
            }
        }
    }

    #[test]
    fn the_fused_pass_equals_libtorch() {
        let case = case(Kind::Float);
        let run = |soft_cap: Option<f64>| {
            let hidden = case.hidden.copy().set_requires_grad(true);
            let options =
                LabelLogprobs { soft_cap, temperature: 0.7, token_tile: 4, vocab_tile: 5, ..Default::default() };
            let out = label_logprobs(&hidden, &case.weight, &case.labels, &options).unwrap();
            out.logprobs.sum(Kind::Float).backward();
            (out.logprobs.detach(), hidden.grad(), out.is_top1)
        };
        // A cap far above every logit changes nothing, and takes libtorch's path.
        let (fused, plain) = (run(None), run(Some(1e6)));
        assert!(max_error(&fused.0, &plain.0) < 1e-5 && max_error(&fused.1, &plain.1) < 1e-5);
        assert!(fused.2.equal(&plain.2));
    }

    #[test]
    fn log_collision_of_the_fused_pass_equals_a_dense_softmax() {
        for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 5e-2)] {
            let case = case(kind);
            for (token_tile, vocab_tile) in [(1, 1), (4, 5), (100, 100)] {
                for wants_hidden in [false, true] {
                    let options = LabelLogprobs { with_collision: true, token_tile, vocab_tile, ..Default::default() };
                    let hidden = case.hidden.copy().set_requires_grad(wants_hidden);
                    let out = label_logprobs(&hidden, &case.weight, &case.labels, &options).unwrap();
                    let error = max_error(&out.log_collision.unwrap(), &naive_log_collision(&case, &options));
                    assert!(error < tolerance, "{kind:?} {options:?}: {error}");
                }
            }
        }
    }

    /// Four equally likely tokens: two draws are the same one time in four.
    #[test]
    fn log_collision_of_a_uniform_distribution_is_minus_the_log_of_its_size() {
        let hidden = Tensor::zeros([1, 2], (Kind::Float, Device::Cpu));
        let weight = Tensor::ones([4, 2], (Kind::Float, Device::Cpu));
        let options = LabelLogprobs { with_collision: true, vocab_tile: 3, ..Default::default() };
        let out = label_logprobs(&hidden, &weight, &Tensor::from_slice(&[3i64]), &options).unwrap();
        assert!((out.log_collision.unwrap().double_value(&[0]) + 4f64.ln()).abs() < 1e-6);
    }

    #[test]
    fn top1_marks_the_most_probable_label() {
        let hidden = Tensor::from_slice(&[1f32, 0.]).view([1, 2]).repeat([2, 1]);
        let weight = Tensor::from_slice(&[0f32, 0., 5., 0., 1., 0.]).view([3, 2]);
        let labels = Tensor::from_slice(&[1i64, 2]);
        let out =
            label_logprobs(&hidden, &weight, &labels, &LabelLogprobs { vocab_tile: 2, ..Default::default() }).unwrap();
        assert_eq!(Vec::<f32>::try_from(&out.is_top1).unwrap(), [1., 0.]);
    }

    #[test]
    fn no_labels_give_an_empty_result() {
        let hidden = Tensor::zeros([0, 2], (Kind::Float, Device::Cpu));
        let weight = Tensor::zeros([3, 2], (Kind::Float, Device::Cpu));
        let labels = Tensor::zeros([0], (Kind::Int64, Device::Cpu));
        assert_eq!(label_logprobs(&hidden, &weight, &labels, &Default::default()).unwrap().logprobs.size(), [0]);
    }

    #[test]
    fn inputs_that_do_not_fit_are_refused() {
        let case = case(Kind::Float);
        let run =
            |labels: &Tensor, options: LabelLogprobs| label_logprobs(&case.hidden, &case.weight, labels, &options);
        let too_high = Tensor::full([9], 23, (Kind::Int64, Device::Cpu));
        assert!(run(&too_high, Default::default()).unwrap_err().to_string().contains("0..23"));
        assert!(run(&case.labels, LabelLogprobs { temperature: 0.0, ..Default::default() }).is_err());
        assert!(run(&case.labels.narrow(0, 0, 3), Default::default()).is_err());
    }
}
