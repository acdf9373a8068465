//! Passes over a rollout: what policy, reference and critic say of it, and the optimizer steps.

use crate::algorithm::{Algorithm, PolicyBatch, Targets};
use crate::packed::ranges;
use crate::probe::first_difference;
use crate::roles::{Critic, Roles, ValuePlaces};
use crate::rollout::Rollout;
use crate::value_loss::value_losses;
use crate::{LossWindow, Result, RlhfError, ScalarHead};
use pt_model::{PackedBatch, PromptGroup, RunOptions};
use pt_tensor::{Kind, LabelLogprobs, Tensor, no_grad};
use pt_train::data::BatchConfig;
use pt_train::data::packing::{epoch_order, split_by_tokens};
use pt_train::settings::TrainConfig;
use pt_train::step::{Optimization, finite};
use pt_train::train::Trained;
use std::iter::repeat_n;
use std::ops::Range;

/// Tokens of a micro-batch where the settings name none.
const MICRO_BATCH: usize = 4096;
/// How far a sampled log-prob may be from the training pass's in f32, nats: rounding is some 1e-5.
const MAX_GAP: f64 = 2e-3;
/// Names of the optimizers' tensors in a checkpoint.
const ACTOR: &str = "actor.";
const CRITIC: &str = "critic.";

/// A rollout and what the roles say of it.
pub(crate) struct Compared {
    pub(crate) rollout: Rollout,
    /// Log-probs under the reference, `[num_tokens]`.
    pub(crate) reference: Option<Vec<f32>>,
    /// `[num_values]`.
    pub(crate) values: Option<Vec<f32>>,
    places: Places,
}

/// Where each prompt's entries are.
struct Places {
    responses: Vec<Range<usize>>,
    lengths: Vec<usize>,
    tokens: Vec<Range<usize>>,
    value_lengths: Vec<usize>,
    values: Vec<Range<usize>>,
    is_kept: Vec<bool>,
}

impl Places {
    fn of<A: Algorithm>(rollout: &Rollout, algorithm: &A) -> Self {
        let (lengths, responses) = (rollout.lengths(), rollout.responses_of_group());
        let value_lengths = algorithm.value_lengths(&lengths, &rollout.is_ended);
        let by_group = |counts: &[usize]| {
            let totals: Vec<usize> = responses.iter().map(|all| counts[all.clone()].iter().sum()).collect();
            ranges(&totals).collect()
        };
        let (tokens, values) = (by_group(&lengths), by_group(&value_lengths));
        Self { tokens, values, is_kept: algorithm.is_kept(rollout), responses, lengths, value_lengths }
    }

    /// Entries of some prompts, one after another.
    fn take<T: Copy>(ranges: &[Range<usize>], groups: &[usize], all: &[T]) -> Vec<T> {
        groups.iter().flat_map(|&group| all[ranges[group].clone()].iter().copied()).collect()
    }

    /// Lengths of the responses that count; 0 for the others.
    fn kept_lengths(&self, groups: &[usize]) -> Vec<usize> {
        let kept = self.lengths.iter().zip(&self.is_kept).map(|(length, is_kept)| length * usize::from(*is_kept));
        Self::take(&self.responses, groups, &kept.collect::<Vec<_>>())
    }
}

/// What the optimizer steps of an iteration were.
#[derive(Debug, Default)]
pub(crate) struct Update {
    /// Means by the name of their metric.
    pub(crate) values: Vec<(&'static str, f64)>,
    /// Tokens that went through models.
    pub(crate) num_tokens: i64,
}

/// Sums of numbers and of what they are over.
#[derive(Default)]
pub(crate) struct Sums(Vec<(&'static str, f64, f64)>);

impl Sums {
    /// Of nothing there is no mean.
    fn add(&mut self, name: &'static str, sum: f64, count: f64) {
        if count == 0.0 {
            return;
        }
        match self.0.iter_mut().find(|(known, ..)| *known == name) {
            Some((_, total, counts)) => (*total, *counts) = (*total + sum, *counts + count),
            None => self.0.push((name, sum, count)),
        }
    }

    fn mean(&self, name: &str) -> f64 {
        self.0.iter().find(|(known, ..)| *known == name).map_or(f64::NAN, |(_, sum, count)| sum / count)
    }

    fn means(&self) -> Vec<(&'static str, f64)> {
        self.0.iter().map(|(name, sum, count)| (*name, sum / count)).collect()
    }
}

fn sum(values: &Tensor) -> f64 {
    values.sum(Kind::Double).double_value(&[])
}

/// The optimizers of actor and critic.
pub(crate) struct Updater<'a, A> {
    actor: Optimization,
    critic: Option<Optimization>,
    config: &'a TrainConfig<A>,
    /// Largest distance of a sampled log-prob from the training pass's in the last iteration, nats.
    pub(crate) sampling_gap: f64,
}

impl<'a, A: Algorithm> Updater<'a, A> {
    pub(crate) fn new(actor: Optimization, critic: Option<Optimization>, config: &'a TrainConfig<A>) -> Self {
        Self { actor, critic, config, sampling_gap: 0.0 }
    }

    fn options(&self) -> LabelLogprobs {
        LabelLogprobs { temperature: self.config.objective.rollout().temperature, ..LabelLogprobs::default() }
    }

    fn split(&self, rollout: &Rollout, groups: &[usize]) -> Vec<Vec<usize>> {
        let most = self.config.batch.max_tokens.unwrap_or(MICRO_BATCH);
        split_by_tokens(groups, Some(most), |group| rollout.groups[group].num_tokens())
    }

    /// Runs reference and critic over a rollout, without graphs. In number formats narrower than f32 the policy, too: a
    /// pass over single tokens rounds otherwise than one over whole responses, and the ratio has to begin at 1.
    pub(crate) fn compare(&mut self, roles: &Roles<'_>, mut rollout: Rollout, step: u64) -> Result<Compared> {
        let algorithm = &self.config.objective;
        let places = Places::of(&rollout, algorithm);
        let reference_role = roles.reference.as_ref().filter(|_| algorithm.needs_reference());
        let is_narrow = roles.actor.model.kind() != Kind::Float;
        let (mut policy, mut reference, mut values) = (Vec::new(), Vec::new(), Vec::new());
        let all: Vec<usize> = (0..rollout.groups.len()).collect();
        let floats = |tensor: Tensor| -> Result<Vec<f32>> {
            Ok(Vec::try_from(tensor.to_kind(Kind::Float).to_device(pt_tensor::Device::Cpu))
                .map_err(pt_tensor::TensorError::from)?)
        };
        for groups in self.split(&rollout, &all) {
            let batch = batch(&rollout, &groups, roles)?;
            if let Some(role) = reference_role {
                let logprobs = roles.reference_logprobs(role, &batch, &self.options())?;
                finite(step, "the reference's log-probs", &logprobs)?;
                reference.extend(floats(logprobs)?);
            }
            if let Some(critic) = &roles.critic {
                let places = value_places(&batch, &places, &groups)?;
                let of_batch = roles.values(critic, &batch, &places)?;
                finite(step, "the critic's values", &of_batch)?;
                values.extend(floats(of_batch)?);
            }
            if is_narrow {
                let Trained { model, sites, .. } = &roles.actor;
                let run = RunOptions::default();
                policy.extend(floats(no_grad(|| model.label_logprobs(&batch, sites, run, &self.options()))?.logprobs)?);
            }
        }
        self.sampling_gap = 0.0;
        if is_narrow {
            let gaps = policy.iter().zip(&rollout.logprobs).map(|(one, other)| f64::from((one - other).abs()));
            self.sampling_gap = gaps.fold(0.0, f64::max);
            rollout.logprobs = policy;
        }
        let reference = reference_role.is_some().then_some(reference);
        Ok(Compared { rollout, reference, values: roles.critic.is_some().then_some(values), places })
    }

    /// The optimizer steps of an iteration; `watch` hears how many are done.
    pub(crate) fn update(
        &mut self,
        roles: &Roles<'_>,
        compared: &Compared,
        targets: &Targets,
        step: u64,
        watch: &mut dyn FnMut(usize, usize),
    ) -> Result<Update> {
        let algorithm = &self.config.objective;
        let updates = algorithm.updates();
        let num_groups = compared.rollout.groups.len();
        let size = num_groups.div_ceil(updates.num_minibatches).max(1);
        let total = updates.num_epochs * num_groups.div_ceil(size);
        let (mut sums, mut update, mut done) = (Sums::default(), Update::default(), 0);
        let is_warming_up =
            algorithm.value_settings().is_some_and(|settings| step <= settings.critic.warmup_iterations);
        'updates: for epoch in 0..updates.num_epochs {
            let deal = BatchConfig { seed: self.config.seed.wrapping_add(step), ..BatchConfig::default() };
            let order = epoch_order(num_groups, &deal, epoch as u64);
            for groups in order.chunks(size) {
                let is_first = epoch == 0 && done == 0;
                if !is_warming_up {
                    let mut own = Sums::default();
                    update.num_tokens +=
                        self.policy_gradients(roles, compared, targets, groups, (step, epoch, is_first), &mut own)?;
                    let is_too_far = updates.target_kl.is_some_and(|target| own.mean("policy/kl_k3") > target);
                    own.0.into_iter().for_each(|(name, sum, count)| sums.add(name, sum, count));
                    if is_too_far {
                        self.actor.discard();
                        break 'updates;
                    }
                    let stepped = self.actor.step(step)?;
                    sums.add("policy/grad_norm", stepped.grad_norm, 1.0);
                    sums.add("learning_rate", stepped.learning_rate, 1.0);
                }
                if let (Some(Critic::Own(trained, head)), Some(optimization)) = (&roles.critic, &mut self.critic) {
                    update.num_tokens += value_gradients(
                        self.config,
                        roles,
                        (trained, head),
                        compared,
                        targets,
                        groups,
                        step,
                        &mut sums,
                    )?;
                    let stepped = optimization.step(step)?;
                    sums.add("val/grad_norm", stepped.grad_norm, 1.0);
                }
                done += 1;
                watch(done, total);
            }
        }
        sums.add("policy/num_updates", done as f64, 1.0);
        update.values = sums.means();
        if let Some((_, ratio)) = update.values.iter().find(|(name, _)| *name == "val/ratio").copied() {
            update.values.iter_mut().filter(|(name, _)| *name == "val/ratio_var").for_each(|(_, square)| {
                *square -= ratio * ratio;
            });
        }
        Ok(update)
    }

    /// Adds the gradients of the policy's loss over some prompts, and of the value loss where the head is the actor's.
    pub(crate) fn policy_gradients(
        &mut self,
        roles: &Roles<'_>,
        compared: &Compared,
        targets: &Targets,
        groups: &[usize],
        (step, epoch, is_first): (u64, usize, bool),
        sums: &mut Sums,
    ) -> Result<i64> {
        let (algorithm, places) = (&self.config.objective, &compared.places);
        let updates = algorithm.updates();
        let window = LossWindow::of(&places.kept_lengths(groups), algorithm.rollout().max_new_tokens);
        let Trained { model, sites, .. } = &roles.actor;
        let run = RunOptions { is_checkpointed: self.config.activation_checkpointing };
        // The entropy of the policy that sampled, but where it is part of the loss.
        let options = LabelLogprobs { with_entropy: updates.entropy_coef > 0.0 || epoch == 0, ..self.options() };
        let mut num_tokens = 0;
        for rows in self.split(&compared.rollout, groups) {
            let batch = batch(&compared.rollout, &rows, roles)?;
            num_tokens += batch.num_tokens();
            let device = model.device();
            let column = |all: &[f32]| Tensor::from_slice(&Places::take(&places.tokens, &rows, all)).to_device(device);
            let (out, values) = match &roles.critic {
                Some(Critic::OnActor(head)) => {
                    let at = value_places(&batch, places, &rows)?;
                    let states = at.states(model, &batch, sites, run)?;
                    let values = head.forward(&states)?;
                    (model.logprobs_of_states(&at.label_states(&states), &batch, sites, &options)?, Some(values))
                }
                _ => (model.label_logprobs(&batch, sites, run, &options)?, None),
            };
            let logprobs = out.logprobs.to_kind(Kind::Float);
            finite(step, "the policy's log-probs", &logprobs)?;
            let old_logprobs = column(&compared.rollout.logprobs);
            let reference = compared.reference.as_deref().map(column);
            let lengths = Places::take(&places.responses, &rows, &places.lengths);
            let is_kept = Places::take(&places.responses, &rows, &places.is_kept);
            if is_first {
                self.check_gap(roles, &batch, &logprobs.detach(), &old_logprobs, &lengths)?;
            }
            let policy = algorithm.policy_loss(&PolicyBatch {
                logprobs: &logprobs,
                old_logprobs: &old_logprobs,
                reference: reference.as_ref(),
                advantages: &column(&targets.advantages),
                lengths: &lengths,
                is_kept: &is_kept,
                window: &window,
            })?;
            let mut loss = policy.loss;
            sums.add("loss/policy_avg", finite(step, "policy loss", &loss)?, rows.len() as f64 / groups.len() as f64);
            // Tokens of responses that count.
            let kept =
                lengths.iter().zip(&is_kept).flat_map(|(length, kept)| repeat_n(f32::from(u8::from(*kept)), *length));
            let kept = Tensor::from_slice(&kept.collect::<Vec<f32>>()).to_device(device);
            let count = sum(&kept);
            if let Some(entropy) = &out.entropy {
                let of_kept = entropy * &kept;
                sums.add("policy/entropy_avg", sum(&of_kept.detach()), count);
                if updates.entropy_coef > 0.0 {
                    loss -= of_kept.sum(Kind::Float) * (updates.entropy_coef / window.num_tokens.max(1) as f64);
                }
            }
            let difference = ((logprobs.detach() - &old_logprobs) * &kept).to_kind(Kind::Double);
            sums.add("policy/approxkl_avg", 0.5 * sum(&difference.square()), count);
            sums.add("policy/kl_k3", sum(&(difference.exp() - 1.0 - &difference)), count);
            let num_ratios = policy.output.ratio.numel() as f64;
            sums.add("policy/clipfrac_avg", sum(&policy.output.is_clipped), num_ratios);
            sums.add("val/ratio", sum(&policy.output.ratio), num_ratios);
            sums.add("val/ratio_var", sum(&policy.output.ratio.square()), num_ratios);
            if let Some(values) = values {
                loss += value_loss(algorithm, compared, targets, (groups, &rows), &values, sums)?;
            }
            backward(loss)?;
        }
        Ok(num_tokens)
    }

    /// That the log-probs recorded while sampling are those of the training pass: before the first optimizer step of an
    /// iteration nothing has moved.
    fn check_gap(
        &mut self,
        roles: &Roles<'_>,
        batch: &PackedBatch,
        logprobs: &Tensor,
        sampled: &Tensor,
        lengths: &[usize],
    ) -> Result<()> {
        let Trained { model, sites, .. } = &roles.actor;
        let gaps = (logprobs - sampled).abs();
        if gaps.numel() == 0 {
            return Ok(());
        }
        if model.kind() != Kind::Float {
            // Measured when the rollout was compared; since then the log-probs are the training pass's own.
            return Ok(());
        }
        let gap = gaps.max().double_value(&[]);
        self.sampling_gap = self.sampling_gap.max(gap);
        if gap <= MAX_GAP {
            return Ok(());
        }
        let worst = gaps.argmax(0, false).int64_value(&[]);
        let response = ranges(lengths).position(|range| range.contains(&(worst as usize))).unwrap_or(0);
        let place = worst as usize - ranges(lengths).nth(response).map_or(0, |range| range.start);
        let temperature = self.config.objective.rollout().temperature;
        let cause = match first_difference(model, sites, batch)? {
            Some(layer) => format!(
                "Two training passes over these tokens already part behind layer {layer}: something in it is random, \
                 such as dropout that is switched on"
            ),
            None => "Two training passes over these tokens agree in every layer, so it is the weights that changed in \
                     between, or a method that treats a token otherwise when it comes alone"
                .into(),
        };
        Err(RlhfError::Config {
            place: "rollout".into(),
            faults: vec![format!(
                "token {place} of response {response} (of a micro-batch) had the log-prob {:.5} when it was sampled and \
                 has {:.5} in the training pass, at temperature {temperature} in both, before any update: sampling and \
                 training do not run the same model, expected at most {MAX_GAP} between them. {cause}",
                sampled.double_value(&[worst]),
                logprobs.double_value(&[worst])
            )],
        })
    }

    pub(crate) fn check_finite(&self, step: u64) -> Result<()> {
        self.actor.check_finite(step)?;
        self.critic.as_ref().map_or(Ok(()), |critic| Ok(critic.check_finite(step)?))
    }

    /// Parameters and moments of both, by name.
    pub(crate) fn state(&self) -> Vec<(String, Tensor)> {
        let named = |prefix: &'static str, optimization: &Optimization| {
            let all = optimization.state().into_iter();
            all.map(move |(name, tensor)| (format!("{prefix}{name}"), tensor)).collect::<Vec<_>>()
        };
        let mut all = named(ACTOR, &self.actor);
        all.extend(self.critic.iter().flat_map(|critic| named(CRITIC, critic)));
        all
    }

    /// Takes back what [`state`](Self::state) gave.
    pub(crate) fn load_state(
        &mut self,
        names: &[String],
        get: &dyn Fn(&str) -> pt_tensor::Result<Tensor>,
    ) -> Result<()> {
        let of = |prefix: &'static str| names.iter().filter_map(move |name| name.strip_prefix(prefix));
        self.actor.load_state(of(ACTOR), |name| get(&format!("{ACTOR}{name}")))?;
        if let Some(critic) = &mut self.critic {
            critic.load_state(of(CRITIC), |name| get(&format!("{CRITIC}{name}")))?;
        }
        Ok(())
    }
}

fn batch(rollout: &Rollout, groups: &[usize], roles: &Roles<'_>) -> Result<PackedBatch> {
    let groups: Vec<&PromptGroup> = groups.iter().map(|&group| &rollout.groups[group]).collect();
    Ok(PackedBatch::new(&groups, roles.actor.model.device())?)
}

fn value_places(batch: &PackedBatch, places: &Places, groups: &[usize]) -> Result<ValuePlaces> {
    let lengths = Places::take(&places.responses, groups, &places.lengths);
    let value_lengths = Places::take(&places.responses, groups, &places.value_lengths);
    ValuePlaces::new(batch, &lengths, &value_lengths)
}

/// Adds the gradients of the value loss over some prompts to a critic of its own.
#[allow(clippy::too_many_arguments, reason = "one call, from the loop")]
pub(crate) fn value_gradients<A: Algorithm>(
    config: &TrainConfig<A>,
    roles: &Roles<'_>,
    (trained, head): (&Trained<'_>, &ScalarHead),
    compared: &Compared,
    targets: &Targets,
    groups: &[usize],
    step: u64,
    sums: &mut Sums,
) -> Result<i64> {
    let options = RunOptions { is_checkpointed: config.activation_checkpointing };
    let most = config.batch.max_tokens.unwrap_or(MICRO_BATCH);
    let mut num_tokens = 0;
    for rows in split_by_tokens(groups, Some(most), |group| compared.rollout.groups[group].num_tokens()) {
        let batch = batch(&compared.rollout, &rows, roles)?;
        num_tokens += batch.num_tokens();
        let places = value_places(&batch, &compared.places, &rows)?;
        let values = head.forward(&places.states(trained.model, &batch, &trained.sites, options)?)?;
        let loss = value_loss(&config.objective, compared, targets, (groups, &rows), &values, sums)?;
        finite(step, "value loss", &loss)?;
        backward(loss)?;
    }
    Ok(num_tokens)
}

/// A micro-batch's part of the value loss over `groups`: vf_coef times the mean over all their values.
fn value_loss<A: Algorithm>(
    algorithm: &A,
    compared: &Compared,
    targets: &Targets,
    (groups, rows): (&[usize], &[usize]),
    values: &Tensor,
    sums: &mut Sums,
) -> Result<Tensor> {
    let places = &compared.places;
    let column = |all: &[f32]| Tensor::from_slice(&Places::take(&places.values, rows, all)).to_device(values.device());
    let Some(settings) = algorithm.value_settings() else { return Ok(values.sum(Kind::Float) * 0.0) };
    let old = column(compared.values.as_deref().unwrap_or(&[]));
    let out = value_losses(values, &old, &column(&targets.returns), settings.clip)?;
    let count: usize = groups.iter().map(|&group| places.values[group].len()).sum();
    let num_values = values.numel() as f64;
    sums.add("loss/value_avg", sum(&out.losses.detach()), num_values);
    sums.add("val/clipfrac_avg", sum(&out.is_clipped), num_values);
    Ok(out.losses.sum(Kind::Float) * (settings.vf_coef / count.max(1) as f64))
}

/// Adds the gradients of a scalar.
fn backward(loss: Tensor) -> Result<()> {
    let one = loss.ones_like();
    Ok(pt_tensor::autograd::backward(&[loss], &[one])?)
}
