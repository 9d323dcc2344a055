//! One simulated history: nodes, network, index, readers and callers, driven by one seed.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use kafold_core::clock::SystemClock;
use kafold_core::index::Advanced;
use kafold_core::{Clock, Offset};

use super::calls::Calls;
use super::coverage::{Coverage, State};
use super::handlers::{SimClock, Task};
use super::index::{Index, Reader};
use super::node::{Looked, Lookup, Node};
use super::random::Random;
use super::reference::{Produced, Reference, Violation};
use crate::wire::{Body, ClaimId};
use crate::writer::{Input, Output, ReportFailure, Status};

/// Steps with faults, then steps without in which everything must come to rest.
const STEPS: u64 = 500;
const HEALING_STEPS_MAX: u64 = 20_000;
const NODES_MAX: usize = 3;

/// A producer: a node's incarnation, and which of its producers.
type ProducerId = (usize, u32);

pub(super) struct World {
    pub(super) random: Random,
    pub(super) step: u64,
    /// Counts outputs: within one step, what was answered before what was produced.
    pub(super) order: u64,
    pub(super) now: Instant,
    begin: Instant,
    pub(super) truth: Reference,
    pub(super) index: Index,
    older_indexes: Vec<Index>,
    pub(super) nodes: Vec<Node>,
    incarnations: usize,
    queues: BTreeMap<ProducerId, VecDeque<Produced>>,
    reports: BTreeMap<ProducerId, VecDeque<Report>>,
    /// What the leader has and its followers do not: not visible to anybody, and lost with the leader.
    unreplicated: VecDeque<(ProducerId, Produced)>,
    /// Whether followers lag in this history.
    lagging: bool,
    /// Records that may still arrive though nobody counts on them.
    late: Vec<Produced>,
    reader: Reader,
    pub(super) calls: Calls,
    pub(super) tasks: Vec<Task>,
    pub(super) clock: SimClock,
    pub(super) coverage: Coverage,
    /// How many of 100 deliveries go wrong.
    pub(super) fault_percent: u64,
    pub(super) healing: bool,
    pub(super) trace: Option<Vec<String>>,
}

struct Report {
    claim: ClaimId,
    seq: u64,
    result: Result<Option<Offset>, ReportFailure>,
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let begin = SystemClock.instant();
        // A third of the histories has a calm network: what goes wrong is crashes and races.
        let fault_percent = [0, 4, 12][random.index(3)];
        let lagging = random.chance(40);
        Self {
            random,
            step: 0,
            order: 0,
            now: begin,
            begin,
            truth: Reference::default(),
            index: Index::default(),
            older_indexes: vec![Index::default()],
            nodes: Vec::new(),
            incarnations: 0,
            queues: BTreeMap::new(),
            reports: BTreeMap::new(),
            unreplicated: VecDeque::new(),
            lagging,
            late: Vec::new(),
            reader: Reader::new(),
            calls: Calls::default(),
            tasks: Vec::new(),
            clock: SimClock::new(begin),
            coverage: Coverage::default(),
            fault_percent,
            healing: false,
            trace: None,
        }
    }

    /// The whole history; the violation if a promise was broken.
    pub(super) fn run(&mut self) -> Result<(), Violation> {
        self.start_node()?;
        while self.step < STEPS {
            self.next_step()?;
        }
        self.heal()
    }

    fn next_step(&mut self) -> Result<(), Violation> {
        self.step += 1;
        self.now += Duration::from_micros(self.random.below(900));
        match self.random.below(100) {
            0..=13 => self.call(),
            14..=19 => self.poll_task(),
            20..=25 => self.take_wish(),
            26..=45 => self.deliver(),
            46..=62 => self.deliver_report(),
            63..=72 => self.answer_read(),
            73..=80 => self.look_up(),
            81..=86 => self.feed_index(),
            87..=91 => self.tick(),
            92..=93 => self.read_log(),
            94 => {
                let records = 1 + self.random.index(6);
                self.replicate(records)
            }
            95..=96 => self.deliver_late(),
            97 => match self.random.below(4) {
                0 => self.rebalance(),
                1 => self.settle_commands(),
                _ => self.disturb(),
            },
            98 => self.wait_long(),
            _ => self.make_producers(),
        }
    }

    pub(super) fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:4} {}", self.step, line()));
        }
    }

    // --- nodes ---------------------------------------------------------------------------------

    fn start_node(&mut self) -> Result<(), Violation> {
        let incarnation = self.incarnations;
        self.incarnations += 1;
        let from = self.index.checkpoint()?;
        let seed = self.random.next();
        self.note(|| format!("start node {incarnation} from {}", from.next));
        let (now, clock) = (self.time_of_day(), self.clock.clone());
        let node = Node::new(incarnation, now, from.clone(), seed, &clock);
        self.nodes.push(node);
        self.give(self.nodes.len() - 1, Input::Start(from))
    }

    /// With clocks that are up to a second apart.
    fn time_of_day(&mut self) -> DateTime<Utc> {
        let passed = self.now.duration_since(self.begin).as_micros() as i64;
        let skew = self.random.below(1_000_000) as i64;
        DateTime::<Utc>::UNIX_EPOCH + TimeDelta::microseconds(1_000_000_000_000 + passed + skew)
    }

    fn crash(&mut self, at: usize) {
        let node = self.nodes.remove(at);
        self.note(|| format!("crash node {}", node.incarnation));
        self.calls.abandon(node.incarnation);
        self.tasks.retain(|task| task.incarnation != node.incarnation);
        for generation in 0..=node.producer {
            self.drop_producer((node.incarnation, generation), false);
        }
    }

    /// What a producer still had is lost, or arrives late.
    fn drop_producer(&mut self, id: ProducerId, tells: bool) {
        let mut told = VecDeque::new();
        for produced in self.queues.remove(&id).unwrap_or_default() {
            if tells {
                let stamp = produced.record.stamp;
                let result = Err(failure("purged"));
                told.push_back(Report { claim: stamp.claim, seq: stamp.seq, result });
            }
            if self.random.chance(50) {
                self.late.push(produced);
            }
        }
        if tells {
            self.reports.entry(id).or_default().extend(told);
        } else {
            self.reports.remove(&id);
        }
    }

    fn disturb(&mut self) -> Result<(), Violation> {
        match self.random.below(9) {
            8 => self.move_leader(),
            0 | 1 if !self.nodes.is_empty() => {
                let at = self.random.index(self.nodes.len());
                self.crash(at);
                Ok(())
            }
            2..=4 if self.nodes.len() < NODES_MAX => self.start_node(),
            5 | 6 if !self.nodes.is_empty() => {
                let at = self.random.index(self.nodes.len());
                self.nodes[at].paused_until = self.step + self.random.below(200);
                if self.random.chance(60) && self.nodes.len() < NODES_MAX {
                    return self.start_node();
                }
                Ok(())
            }
            7 => self.roll_back_index(),
            _ => Ok(()),
        }
    }

    /// The group takes the partition from a node, or gives it back.
    fn rebalance(&mut self) -> Result<(), Violation> {
        if let Some(at) = self.pick(|node| node.released) {
            let from = self.index.checkpoint()?;
            let incarnation = self.nodes[at].incarnation;
            self.note(|| format!("node {incarnation} is assigned again from {}", from.next));
            self.coverage.saw(State::AssignedAgain);
            self.nodes[at].begin_again(from.clone());
            return self.give(at, Input::Start(from));
        }
        let Some(at) = self.pick(|node| !node.releasing) else { return Ok(()) };
        self.nodes[at].releasing = true;
        if self.random.chance(30) {
            self.coverage.saw(State::Abandoned);
            return self.give(at, Input::Abandon);
        }
        self.give(at, Input::Release)
    }

    /// Forwarded commands are settled on a node that owns.
    fn settle_commands(&mut self) -> Result<(), Violation> {
        let Some(at) = self.pick(|node| node.hold.is_some()) else { return Ok(()) };
        let (more, wanted) = (self.random.below(4), self.random.chance(50));
        let node = &mut self.nodes[at];
        let Some(claim) = node.hold else { return Ok(()) };
        node.mark = node.mark.plus(more);
        if wanted {
            node.mark_wanted = node.mark;
        }
        let mark = node.mark;
        self.give(at, Input::CommandsMark { claim, mark, wanted })
    }

    /// The index is deleted or restored from an older copy.
    fn roll_back_index(&mut self) -> Result<(), Violation> {
        if self.random.chance(60) {
            self.older_indexes.push(self.index.clone());
            return Ok(());
        }
        let older = self.random.index(self.older_indexes.len());
        self.index = self.older_indexes[older].clone();
        self.coverage.saw(State::IndexRolledBack);
        self.note(|| "the index is rolled back".into());
        Ok(())
    }

    /// A node that is there, not paused, and passes the filter.
    pub(super) fn pick(&mut self, wanted: impl Fn(&Node) -> bool) -> Option<usize> {
        let step = self.step;
        let able: Vec<usize> = (0..self.nodes.len())
            .filter(|at| self.nodes[*at].paused_until <= step && wanted(&self.nodes[*at]))
            .collect();
        (!able.is_empty()).then(|| able[self.random.index(able.len())])
    }

    fn tick(&mut self) -> Result<(), Violation> {
        let now = self.now;
        match self.pick(|node| node.writer.next_wake().is_some_and(|wake| wake <= now)) {
            Some(at) => self.give(at, Input::Tick),
            None => Ok(()),
        }
    }

    fn wait_long(&mut self) -> Result<(), Violation> {
        self.now += Duration::from_millis(self.random.below(60));
        Ok(())
    }

    fn make_producers(&mut self) -> Result<(), Violation> {
        if let Some(at) = self.pick(|node| node.producer_due) {
            let node = &mut self.nodes[at];
            node.producer_due = false;
            let old = (node.incarnation, node.producer);
            node.producer += 1;
            self.drop_producer(old, true);
            return self.give(at, Input::ProducerReady);
        }
        if self.fault_percent > 4
            && !self.healing
            && self.random.chance(20)
            && let Some(at) = self.pick(|_| true)
        {
            self.nodes[at].producer_due = true;
        }
        Ok(())
    }

    // --- inputs and outputs --------------------------------------------------------------------

    pub(super) fn give(&mut self, at: usize, input: Input) -> Result<(), Violation> {
        let mut out = Vec::new();
        let shown = self.trace.is_some().then(|| format!("{input:?}"));
        let cause = cause(&input);
        self.nodes[at].writer.handle(self.now, input, &mut out);
        if let Some(shown) = shown {
            let incarnation = self.nodes[at].incarnation;
            self.note(|| format!("node {incarnation} <- {}", cut(&shown)));
            for output in &out {
                let shown = format!("{output:?}");
                self.note(|| format!("node {incarnation} -> {}", cut(&shown)));
            }
        }
        for output in out {
            self.obey(at, output, cause)?;
        }
        Ok(())
    }

    fn obey(&mut self, at: usize, output: Output, cause: Cause) -> Result<(), Violation> {
        self.order += 1;
        let node = &mut self.nodes[at];
        match output {
            Output::Produce(record) => {
                if matches!(record.body, Body::Barrier) {
                    node.barriers.insert((record.stamp.claim.epoch.0, record.stamp.seq));
                }
                let by = node.incarnation;
                let id = (by, node.producer);
                self.calls.produced(&record);
                let produced = Produced { record, by, order: self.order };
                self.queues.entry(id).or_default().push_back(produced);
                Ok(())
            }
            Output::Read { from, wait } => {
                node.read = Some((from, self.now + wait));
                Ok(())
            }
            Output::Load { stream } => {
                node.lookups.push(Lookup { stream, command_id: None, tail: None });
                Ok(())
            }
            Output::Find { stream, command_id } => {
                self.coverage.saw(State::LookedUpBeyondTheWindow);
                node.lookups.push(Lookup { stream, command_id: Some(command_id), tail: None });
                Ok(())
            }
            Output::Proven(proven) => {
                for event in &proven.events {
                    if !self.truth.events.contains(event) {
                        return Err(format!("{event:?} was told as proven and is not in the log"));
                    }
                }
                node.tail.push(proven);
                Ok(())
            }
            Output::Appended { request, result } => self.appended(at, request, result, cause),
            Output::Confirmed { request, result } => self.confirmed(at, request, result, cause),
            Output::FreshProducer => {
                self.coverage.saw(State::FreshProducer);
                node.producer_due = true;
                Ok(())
            }
            Output::Owned { claim, commands_mark } => {
                node.owned += 1;
                if node.owned > 1 {
                    self.coverage.saw(State::ReClaim);
                }
                if std::mem::take(&mut node.was_superseded) {
                    self.coverage.saw(State::TakenBack);
                }
                node.hold = Some(claim);
                node.mark = commands_mark;
                (node.mark_wanted, node.mark_settled) = (commands_mark, commands_mark);
                // The next owner goes on where the one before was known to be, if nobody came since.
                if commands_mark > self.truth.mark {
                    return Err(format!("mark {commands_mark} is above {}", self.truth.mark));
                }
                Ok(())
            }
            Output::CommandsSettled(mark) => {
                node.mark_settled = mark;
                self.coverage.saw(match cause {
                    Cause::Report(claim, seq) if node.barriers.contains(&(claim.epoch.0, seq)) => {
                        State::CommandsSettledByBarrier
                    }
                    _ => State::CommandsSettledByCommit,
                });
                // Whoever is answered by it would be decided anew if the log did not say it.
                match mark <= self.truth.mark {
                    true => Ok(()),
                    false => {
                        Err(format!("{mark} is told as settled, the log says {}", self.truth.mark))
                    }
                }
            }
            Output::Superseded(_) => {
                node.hold = None;
                node.was_superseded = true;
                self.coverage.saw(State::Superseded);
                Ok(())
            }
            Output::Doubt(_) => {
                node.hold = None;
                Ok(())
            }
            Output::Halted(cause) => Err(format!("node {} halted: {cause}", node.incarnation)),
            Output::Released => {
                let incarnation = node.incarnation;
                if !std::mem::replace(&mut node.releasing, true) {
                    return Err(format!("node {incarnation} gave up unasked"));
                }
                (node.hold, node.released) = (None, true);
                self.coverage.saw(State::Released);
                match self.calls.open_of(incarnation) {
                    0 => Ok(()),
                    open => Err(format!("node {incarnation} gave up with {open} calls open")),
                }
            }
        }
    }

    // --- the log -------------------------------------------------------------------------------

    fn append(&mut self, produced: Produced) -> Result<Offset, Violation> {
        self.note(|| format!("log <- {:?} of node {}", produced.record.stamp, produced.by));
        let offset = self.truth.append(produced, &mut self.coverage)?;
        self.calls.check_denied(&self.truth)?;
        Ok(offset)
    }

    /// The first request of some producer reaches the broker, or does not.
    fn deliver(&mut self) -> Result<(), Violation> {
        let filled: Vec<ProducerId> =
            self.queues.iter().filter(|(_, queue)| !queue.is_empty()).map(|(id, _)| *id).collect();
        if filled.is_empty() {
            return Ok(());
        }
        let id = filled[self.random.index(filled.len())];
        let Some(produced) = self.queues.get_mut(&id).and_then(VecDeque::pop_front) else {
            return Ok(());
        };
        let stamp = produced.record.stamp;
        let faulty = !self.healing && self.random.chance(self.fault_percent);
        let result = if faulty {
            self.replicate(usize::MAX)?;
            self.deliver_badly(id, produced)?
        } else {
            self.unreplicated.push_back((id, produced));
            return if self.lagging { Ok(()) } else { self.replicate(usize::MAX) };
        };
        if let Some(result) = result {
            let report = Report { claim: stamp.claim, seq: stamp.seq, result };
            self.reports.entry(id).or_default().push_back(report);
        }
        Ok(())
    }

    /// Followers have caught up with so many records: they are in the log, and reported.
    fn replicate(&mut self, records_max: usize) -> Result<(), Violation> {
        for _ in 0..records_max.min(self.unreplicated.len()) {
            let Some((id, produced)) = self.unreplicated.pop_front() else { break };
            let stamp = produced.record.stamp;
            let offset = self.append(produced)?;
            // Nobody is there to hear it when the node has crashed.
            if self.nodes.iter().any(|node| node.incarnation == id.0 && node.producer == id.1) {
                let report =
                    Report { claim: stamp.claim, seq: stamp.seq, result: Ok(Some(offset)) };
                self.reports.entry(id).or_default().push_back(report);
            }
        }
        Ok(())
    }

    /// A follower becomes the leader: of what it does not have, nothing was acknowledged.
    fn move_leader(&mut self) -> Result<(), Violation> {
        if self.unreplicated.is_empty() {
            return Ok(());
        }
        self.coverage.saw(State::LeaderMoved);
        let kept = self.random.index(self.unreplicated.len() + 1);
        self.replicate(kept)?;
        self.note(|| "the leader is gone, with what it alone had".into());
        while let Some((id, produced)) = self.unreplicated.pop_back() {
            let alive =
                self.nodes.iter().any(|node| node.incarnation == id.0 && node.producer == id.1);
            if alive && self.random.chance(70) {
                // The producer has no answer, and sends it again to the new leader.
                self.coverage.saw(State::TruncatedSentAgain);
                self.queues.entry(id).or_default().push_front(produced);
                continue;
            }
            self.coverage.saw(State::Truncated);
            let stamp = produced.record.stamp;
            if alive {
                let result = Err(failure("timed out"));
                let report = Report { claim: stamp.claim, seq: stamp.seq, result };
                self.reports.entry(id).or_default().push_back(report);
            }
            if self.random.chance(30) {
                self.late.push(produced);
            }
        }
        Ok(())
    }

    fn deliver_badly(
        &mut self,
        id: ProducerId,
        produced: Produced,
    ) -> Result<Option<Result<Option<Offset>, ReportFailure>>, Violation> {
        let stamp = produced.record.stamp;
        Ok(match self.random.below(10) {
            0 => Some(Err(failure("timed out"))),
            1 => {
                self.late.push(produced);
                Some(Err(failure("timed out")))
            }
            2 => {
                self.append(produced)?;
                Some(Err(failure("connection lost")))
            }
            3 => {
                self.append(produced)?;
                Some(Ok(None))
            }
            4 => {
                // A retry after a lost response: the broker has it twice, or the copy is told.
                let copy = produced.clone();
                if self.random.chance(40) {
                    // It will be told about the copy, after whatever comes in between.
                    self.append(produced)?;
                    self.queues.entry(id).or_default().push_front(copy);
                    return Ok(None);
                }
                let first = self.append(produced)?;
                if self.random.chance(50) {
                    let second = self.append(copy)?;
                    Some(Ok(Some(second)))
                } else {
                    self.late.push(copy);
                    Some(Ok(Some(first)))
                }
            }
            5 => {
                self.append(produced)?;
                // Never by chance the one offset that it must have: that needs a true answer.
                let base = self.truth.claims.get(&(stamp.claim.epoch.0, stamp.claim.nonce.0));
                let expected = base.map(|base| base.plus(stamp.seq));
                let nonsense = Offset(self.random.below(self.truth.end().0 + 4));
                Some(Ok(Some(nonsense).filter(|nonsense| Some(*nonsense) != expected)))
            }
            6 => {
                self.append(produced)?;
                None
            }
            7 => None,
            8 => {
                if self.random.chance(50) {
                    self.late.push(produced);
                }
                Some(Err(ReportFailure { fatal: true, ..failure("fatal") }))
            }
            _ => Some(Err(ReportFailure { refused: true, ..failure("refused") })),
        })
    }

    fn deliver_late(&mut self) -> Result<(), Violation> {
        if self.late.is_empty() {
            return Ok(());
        }
        let at = self.random.index(self.late.len());
        let produced = self.late.swap_remove(at);
        self.replicate(usize::MAX)?;
        self.append(produced).map(|_| ())
    }

    fn deliver_report(&mut self) -> Result<(), Violation> {
        let Some(at) = self.pick(|_| true) else { return Ok(()) };
        let incarnation = self.nodes[at].incarnation;
        let filled: Vec<ProducerId> = self
            .reports
            .iter()
            .filter(|(id, queue)| id.0 == incarnation && !queue.is_empty())
            .map(|(id, _)| *id)
            .collect();
        if filled.is_empty() {
            return Ok(());
        }
        let id = filled[self.random.index(filled.len())];
        match self.reports.get_mut(&id).and_then(VecDeque::pop_front) {
            Some(Report { claim, seq, result }) => {
                self.give(at, Input::Report { claim, seq, result })
            }
            None => Ok(()),
        }
    }

    fn answer_read(&mut self) -> Result<(), Violation> {
        let (now, end) = (self.now, self.truth.end());
        let due = |read: &Option<(Offset, Instant)>| {
            read.is_some_and(|(from, until)| from < end || until <= now)
        };
        let Some(at) = self.pick(|node| due(&node.read)) else { return Ok(()) };
        let Some((from, _)) = self.nodes[at].read.take() else { return Ok(()) };
        if !self.healing && self.random.chance(self.fault_percent) {
            return self.give(at, Input::ReadFailed);
        }
        let limit = 1 + self.random.below(12) as usize;
        let records: Vec<_> =
            self.truth.log.iter().skip(from.0 as usize).take(limit).cloned().collect();
        let mut end = end;
        if !self.healing && self.random.chance(5) {
            end = Offset(self.random.below(end.0 + 1));
            self.coverage.saw(State::LowLogEnd);
        }
        self.give(at, Input::Records { records, end })
    }

    // --- index and readers ---------------------------------------------------------------------

    fn look_up(&mut self) -> Result<(), Violation> {
        let Some(at) = self.pick(|node| !node.lookups.is_empty()) else { return Ok(()) };
        let place = self.random.index(self.nodes[at].lookups.len());
        let node = &mut self.nodes[at];
        let lookup = &mut node.lookups[place];
        if lookup.tail.is_none() {
            let in_tail =
                lookup.command_id.and_then(|id| node.tail.find_command(&lookup.stream, id));
            let view = node.tail.view(&lookup.stream, kafold_core::Version::EMPTY);
            lookup.tail = Some((view, in_tail));
            return Ok(());
        }
        let lookup = node.lookups.swap_remove(place);
        let looked = self.nodes[at].look(&lookup, &self.index, &mut self.random)?;
        let stream = lookup.stream;
        let input = match looked {
            Looked::Head(head) => {
                if matches!(head, Err(kafold_core::ReadError::Diverged { .. })) {
                    self.coverage.saw(State::LoadRefused);
                }
                Input::Loaded { stream, head }
            }
            Looked::Command(command_id, found) => Input::Found { stream, command_id, found },
        };
        self.give(at, input)
    }

    fn feed_index(&mut self) -> Result<(), Violation> {
        let Some(at) = self.pick(|_| true) else { return Ok(()) };
        let events_max = 1 + self.random.index(8);
        let node = &mut self.nodes[at];
        let Some(batch) = node.feed.take() else {
            node.feed = node.tail.batch(node.index_at, events_max);
            return Ok(());
        };
        if !self.healing && self.random.chance(self.fault_percent) {
            // The database refuses: the same again later.
            return Ok(());
        }
        let advanced = self.index.advance(&batch, &mut self.coverage)?;
        self.index.check(&self.truth)?;
        if self.random.chance(5) {
            // It was done, and the answer lost: the same again later.
            return Ok(());
        }
        let node = &mut self.nodes[at];
        match advanced {
            Advanced::Moved => {
                node.index_at = batch.to.next;
                node.tail.drop_below(batch.to.next);
                self.give(at, Input::Indexed(batch.to.next))
            }
            Advanced::Behind(cursor) => {
                let position = cursor.map_or(Offset(0), |cursor| cursor.next);
                node.index_at = position;
                if position < node.tail.start() {
                    // What it needs is not in memory any more: begin again from there.
                    self.crash(at);
                    return self.start_node();
                }
                Ok(())
            }
        }
    }

    fn read_log(&mut self) -> Result<(), Violation> {
        match self.random.below(8) {
            0 => self.reader.restart(&mut self.coverage),
            1 | 2 => {
                self.reader.store();
                Ok(())
            }
            _ => {
                let records = 1 + self.random.below(6);
                self.reader.read(&self.truth, records)
            }
        }
    }

    // --- the end -------------------------------------------------------------------------------

    /// Without faults everything comes to rest: every call is answered, and the one node that is left
    /// owns. The others crash or are told to give up.
    fn heal(&mut self) -> Result<(), Violation> {
        self.healing = true;
        self.lagging = false;
        self.replicate(usize::MAX)?;
        self.note(|| "healing".into());
        if self.random.chance(50) {
            self.late.clear();
        }
        for node in &mut self.nodes {
            node.paused_until = 0;
        }
        for at in (0..self.nodes.len()).rev() {
            if self.index.position() < self.nodes[at].tail.start() {
                self.crash(at);
            } else {
                self.nodes[at].index_at = self.nodes[at].index_at.min(self.index.position());
            }
        }
        for at in (1..self.nodes.len()).rev() {
            if self.nodes[at].releasing || self.random.chance(50) {
                self.crash(at);
            } else {
                self.nodes[at].releasing = true;
                self.give(at, Input::Release)?;
            }
        }
        let last = self.step + HEALING_STEPS_MAX;
        while self.step < last {
            if self.is_at_rest() {
                return self.finish();
            }
            self.keep_one_node()?;
            self.next_step_of_healing()?;
        }
        let states: Vec<_> =
            self.nodes.iter().map(|node| (node.incarnation, node.writer.status())).collect();
        let (open, handled) = (self.calls.open(), self.tasks.len());
        Err(format!("no rest: {open} calls open, {handled} in handlers, {states:?}"))
    }

    /// Whoever has given up is gone, and somebody is there.
    fn keep_one_node(&mut self) -> Result<(), Violation> {
        if let Some(at) = self.nodes.iter().position(|node| node.released) {
            self.crash(at);
        }
        if self.nodes.is_empty() { self.start_node() } else { Ok(()) }
    }

    fn next_step_of_healing(&mut self) -> Result<(), Violation> {
        self.step += 1;
        self.now += Duration::from_micros(300);
        match self.random.below(10) {
            0 => self.deliver(),
            1 => self.deliver_report(),
            2 => self.answer_read(),
            3 => self.look_up(),
            4 => self.feed_index(),
            5 => self.tick(),
            6 => self.deliver_late(),
            7 => self.poll_task(),
            8 => self.take_wish(),
            _ => self.make_producers(),
        }
    }

    fn is_at_rest(&self) -> bool {
        let owners =
            self.nodes.iter().filter(|node| matches!(node.writer.status(), Status::Owning));
        self.calls.open() == 0
            && self.tasks.is_empty()
            && owners.count() == 1
            && self.nodes.len() == 1
            && self.nodes.iter().all(|node| node.mark_settled >= node.mark_wanted)
            && self.queues.values().all(VecDeque::is_empty)
            && self.late.is_empty()
            && self.nodes.iter().all(|node| node.lookups.is_empty())
            && self.index.position() == self.fed_to()
    }

    /// Where the index of the owner will stand.
    fn fed_to(&self) -> Offset {
        let owner = self.nodes.iter().find(|node| matches!(node.writer.status(), Status::Owning));
        owner.map_or(Offset(0), |owner| owner.tail.next().next)
    }

    fn finish(&mut self) -> Result<(), Violation> {
        self.index.check(&self.truth)?;
        self.reader.read(&self.truth, u64::MAX)?;
        self.calls.check_denied(&self.truth)?;
        let mut fresh = Reader::new();
        fresh.read(&self.truth, u64::MAX)?;
        Ok(())
    }
}

/// What made a writer answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    Call,
    Report(ClaimId, u64),
    Records,
    Looked,
    Abandon,
    Other,
}

fn cause(input: &Input) -> Cause {
    match input {
        Input::Submit { .. } | Input::Confirm { .. } => Cause::Call,
        Input::Report { claim, seq, .. } => Cause::Report(*claim, *seq),
        Input::Records { .. } => Cause::Records,
        Input::Loaded { .. } | Input::Found { .. } => Cause::Looked,
        Input::Abandon => Cause::Abandon,
        _ => Cause::Other,
    }
}

fn failure(reason: &str) -> ReportFailure {
    ReportFailure { fatal: false, refused: false, reason: reason.into() }
}

fn cut(text: &str) -> String {
    text.chars().take(400).collect()
}
