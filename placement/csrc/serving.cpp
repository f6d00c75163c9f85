// What placement/serving.py defines. Steps that only decode and change nothing else are taken many at a time: the
// i-th of them takes base + i * slope, so their end is a closed form. What happens meanwhile cuts them short.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <deque>
#include <limits>
#include <queue>
#include <vector>

namespace {

struct Coefficients {
    double a, b, c;
    double at(double x, double y) const { return a + b * x + c * y; }
};

// These as placement/native.py declares them.
struct LaneSpec {
    Coefficients prompt, large_prompt, decode, large_decode;
    double large_tokens, large_rows, shared_ms, shared_rows, every_step_ms, draft_ms, draft_sequence_ms, tokens_per_step, rows, kv_tokens;
    double prompt_contention[2], decode_contention[2];  // beside prompts, beside decodes
    double cores, report_phase;
    int64_t role, chunk_tokens, max_sequences, island, host;
};
struct Link {
    double ms_per_token, latency_ms;
};
struct Outage {
    double at_ms, until_ms;
    int64_t lane;
};

enum Role { prefills, decodes, does_both };
enum class At { router, waiting, prompt, held, joined, decoding, done };

struct Request {
    int prompt, output, cached;
    int emitted = 0, target = 0, computed = 0;  // target: tokens to compute before the next can be drawn
    int p = -1, d = -1;                         // lanes that prefill and decode it
    int attempt = 0, missed = 0;                // targets, by their bits
    At at = At::router;
    bool reserved = false;
    double sent_ms = 0.0;  // when what was sent so far has arrived
    int64_t joined_at = 0; // count of the lane's decode steps
};

constexpr double idle = -1.0;

// What the router looks at of every lane for every request, side by side in memory. As lanes.LaneState has it.
struct Told {
    int64_t role, island;
    double next_report_ms = 0.0;
    int64_t free = 0, pending = 0;
    int live = 0, down = 0;
};

struct Lane {
    const LaneSpec* spec;
    Told* told;
    std::deque<int> waiting, incoming;
    std::vector<int> prompts, joined;
    std::vector<std::pair<int64_t, int>> decoding;  // a heap: (the decode step after which it ends, request), least first
    std::vector<std::pair<int, int>> chunks;        // of the step that runs: (request, tokens)
    double kv_used = 0.0, context = 0.0;
    double start_ms = 0.0, base_ms = 0.0, slope_ms = 0.0, busy_ms = 0.0;  // of the steps that run, if alone
    double prompt_share = 0.0, done_ms = 0.0, since_ms = 0.0, slowdown = 1.0;  // as lanes.StepClock
    double computing = idle;                                                  // as lanes.LaneState
    int64_t steps = 0, planned = 0, pending = 0;
    int seats = 0, version = 0;
    bool busy = false, starting = false, advances = false;

    double work_ms(int64_t count) const {
        return count * base_ms + slope_ms * (static_cast<double>(count) * (count - 1) / 2);
    }
    double end_ms(int64_t count) const { return since_ms + (work_ms(count) - done_ms) * slowdown; }
    double growth() const { return decoding.size() * spec->tokens_per_step; }
    bool jumping() const { return busy && chunks.empty(); }
    double context_of(const Request& r) const { return r.target + spec->tokens_per_step * (steps - r.joined_at); }
};

// A run may end when more than `allowed` of the requests from `from` on have missed a target of these metrics.
struct Window {
    int64_t metrics, from, allowed;
};
struct Targets {
    double ttft_ms, tpot_ms, e2e_ms;
};
enum Metric { ttft = 1, tpot = 2, e2e = 4 };

// At one instant: first what ends, then what begins; by lane or request.
enum Rank { outage, ending };
enum Kind { fails, is_repaired, step_ends, kv_arrives };
// As one number, by which events are in order without a branch that nobody could foresee: the bits of the time, which is
// not negative, and then of (rank, index, kind, version).
struct Event {
    unsigned __int128 place;
    Event(double at_ms, int rank, int index, int kind, int version)
        : place(static_cast<unsigned __int128>(std::bit_cast<uint64_t>(at_ms)) << 64 |
                (static_cast<uint64_t>(rank) << 63 | static_cast<uint64_t>(index) << 32 |
                 static_cast<uint64_t>(kind) << 30 | static_cast<uint64_t>(version))) {}
    double time() const { return std::bit_cast<double>(static_cast<uint64_t>(place >> 64)); }
    int index() const { return static_cast<uint64_t>(place) >> 32 & 0x7fffffff; }
    int kind() const { return static_cast<uint64_t>(place) >> 30 & 3; }
    int version() const { return static_cast<uint64_t>(place) & 0x3fffffff; }
    bool operator>(const Event& other) const { return place > other.place; }
};

// Of what is not negative.
int64_t rounded_up(double value) {
    const auto whole = static_cast<int64_t>(value);
    return whole + (whole < value);
}

class Serving {
  public:
    Serving(const LaneSpec* specs, int num_lanes, const Link* links, int num_links, const int32_t* paths,
            int64_t handoff_min_tokens, double report_ms, const Targets& targets, const Window* windows, int num_windows,
            double* first, double* last)
        : lanes_(num_lanes), told_(num_lanes), links_(links), link_free_(num_links), paths_(paths), handoff_min_(handoff_min_tokens),
          report_ms_(report_ms), targets_(targets), windows_(windows, windows + num_windows), first_(first), last_(last) {
        for (const Window& window : windows_) failed_ |= window.allowed < 0;
        for (int i = 0; i < num_lanes; ++i) {
            told_[i].role = specs[i].role;
            told_[i].island = specs[i].island;
            all_.push_back(i);
            (specs[i].role == prefills ? givers_ : takers_).push_back(i);
            lanes_[i].spec = &specs[i];
            lanes_[i].told = &told_[i];
            contention_ |= contends(specs[i]);
        }
    }

    // Whether it ran to the end.
    bool run(int n, const double* arrivals, const int32_t* prompt, const int32_t* output, const int32_t* cached,
             const Outage* outages, int num_outages) {
        requests_.reserve(n);
        arrivals_ = arrivals;
        for (int i = 0; i < num_outages; ++i) {
            push(outages[i].at_ms, outage, outages[i].lane, fails);
            push(outages[i].until_ms, outage, outages[i].lane, is_repaired);
        }
        while (static_cast<int>(requests_.size()) < n || !events_.empty() || !starting_.empty()) {
            if (failed_) return false;
            const int next = requests_.size();
            if (next < n && arrivals[next] <= next_time()) {
                now_ = arrivals[next];
                requests_.push_back({prompt[next], output[next], cached[next]});
                route(next);
                continue;
            }
            if (!starting_.empty() && (events_.empty() || events_.top().time() > now_)) {
                const int lane = starting_.top();
                starting_.pop();
                lanes_[lane].starting = false;
                begin(lane);
                continue;
            }
            const Event event = events_.top();
            events_.pop();
            now_ = event.time();
            for (; overdue(now_, begun_, targets_.ttft_ms); ++begun_)
                if (requests_[begun_].emitted == 0) miss(begun_, ttft);
            for (; overdue(now_, ended_, targets_.e2e_ms); ++ended_)
                if (requests_[ended_].at != At::done) miss(ended_, e2e);
            handle(event);
        }
        return !failed_;
    }

    int64_t preemptions = 0;
    const std::vector<Lane>& lanes() const { return lanes_; }

  private:
    void push(double time, int rank, int index, int kind, int version = 0) {
        events_.emplace(time, rank, index, kind, version);
    }

    double next_time() const {
        if (!starting_.empty()) return now_;
        return events_.empty() ? std::numeric_limits<double>::infinity() : events_.top().time();
    }

    void handle(const Event& event) {
        const int index = event.index();
        switch (event.kind()) {
            case fails: return fail(index);
            case is_repaired: return repair(index);
            case step_ends: if (event.version() == lanes_[index].version) end(index); return;
            case kv_arrives: if (event.version() == requests_[index].attempt) kv_arrived(index); return;
        }
    }

    // --- routing ---------------------------------------------------------------------------------------------------

    // As LaneState.report: what was so when it was due, so of the steps that run those that had ended before.
    void report(Lane& lane) const {
        Told& told = *lane.told;
        if (now_ < told.next_report_ms) return;
        told.pending = lane.pending;
        double due = now_;
        if (report_ms_ > 0) {
            const double phase = lane.spec->report_phase, number = std::floor(now_ / report_ms_ + phase);
            due = std::max(told.next_report_ms, (number - phase) * report_ms_);
            told.next_report_ms = (number + 1 - phase) * report_ms_;
        }
        const double used = lane.kv_used + (lane.jumping() ? (steps_until(lane, due) - 1) * lane.growth() : 0.0);
        told.free = static_cast<int64_t>(std::floor(lane.spec->kv_tokens - used + 0.5));
    }

    // Before what it has to do, or holds, changes.
    void report_due(Lane& lane) const {
        if (report_ms_ > 0) report(lane);
    }

    void change(Lane& lane, int live, int64_t pending) const {
        report_due(lane);
        lane.told->live += live;  // requests come from the router, and end with an answer that it passes on
        lane.pending += pending;
    }

    // The router knows, as it is its own doing.
    void send_to(Lane& lane, int live, int64_t pending, int tokens) const {
        change(lane, live, pending);
        lane.told->pending += pending;
        lane.told->free -= tokens;
    }

    // Of those asked, where the router always knows; else, if any is due, of all: mostly none is. Who reports before it is
    // looked at tells the same, as what changes is reported first.
    void reports_due(const std::vector<int>& asked) {
        if (now_ < next_report_ms_) return;
        if (report_ms_ > 0) next_report_ms_ = std::numeric_limits<double>::infinity();
        for (int i : report_ms_ > 0 ? all_ : asked) {
            if (told_[i].down) continue;
            report(lanes_[i]);
            if (report_ms_ > 0) next_report_ms_ = std::min(next_report_ms_, told_[i].next_report_ms);
        }
    }

    // Without branches on what is compared: lanes are much alike.
    int least_live(const Request& r) {
        reports_due(takers_);
        const int64_t needed = r.target - r.cached;
        int64_t least = std::numeric_limits<int64_t>::max(), most_free = 0;
        int best = -1;
        for (int i : takers_) {
            const Told& told = told_[i];
            if (told.down) continue;
            const int64_t free = told.free, live = told.live + (static_cast<int64_t>(free < needed) << 32);
            const bool better = (live < least) | ((live == least) & (free > most_free));
            least = better ? live : least;
            most_free = better ? free : most_free;
            best = better ? i : best;
        }
        return best;
    }

    int least_pending(int64_t island) {
        reports_due(givers_);
        int64_t least = std::numeric_limits<int64_t>::max();
        int best = -1;
        for (int i : givers_) {
            const Told& told = told_[i];
            if (told.down || told.island != island) continue;
            const bool better = told.pending < least;
            least = better ? told.pending : least;
            best = better ? i : best;
        }
        return best;
    }

    void route(int index) {
        Request& r = requests_[index];
        r.target = r.prompt + r.emitted;
        r.at = At::router;
        r.reserved = false;
        r.d = least_live(r);
        if (r.d < 0) return stranded_.push_back(index);
        r.p = r.d;
        if (lanes_[r.d].spec->role == decodes) {
            const int p = least_pending(lanes_[r.d].spec->island);
            const bool ends_at_once = r.emitted + 1 >= r.output;
            if (p >= 0 && (ends_at_once || r.target - r.cached >= handoff_min_)) r.p = p;
            if (ends_at_once) r.d = r.p;  // there will be no KV to hand over
        }
        send_to(lanes_[r.d], 1, 0, r.prompt);
        r.at = At::waiting;
        Lane& lane = lanes_[r.p];
        send_to(lane, 0, r.target - r.cached, 0);
        lane.waiting.push_back(index);
        if (lane.waiting.size() == 1) cut_short(r.p);  // behind another that has to wait it would change nothing
        kick(r.p);
    }

    void kick(int index) {
        Lane& lane = lanes_[index];
        if (lane.busy || lane.starting || lane.told->down) return;
        lane.starting = true;
        starting_.push(index);
    }

    // --- steps -----------------------------------------------------------------------------------------------------

    void begin(int index) {
        Lane& lane = lanes_[index];
        if (lane.busy || lane.told->down) return;
        report_due(lane);
        for (int joined : lane.joined) join(lane, joined);
        lane.joined.clear();
        make_room(lane);
        while (!lane.incoming.empty() && reserve(requests_[lane.incoming.front()])) {
            const int request = lane.incoming.front();
            lane.incoming.pop_front();
            send_all(request);
        }
        const double squares = choose_chunks(lane);
        if (!lane.chunks.empty() || !lane.decoding.empty()) {
            start(index, squares);
            push(lane.end_ms(lane.planned), ending, index, step_ends, lane.version);
        }
        compute(index, lane.busy ? lane.prompt_share : idle);
    }

    // By the others that compute on its host.
    double slowdown(int index) const {
        if (!contention_) return 1.0;
        const Lane& lane = lanes_[index];
        const LaneSpec& spec = *lane.spec;
        double wanted = spec.cores, more = 0.0;
        for (int i = 0; i < static_cast<int>(lanes_.size()); ++i) {
            const Lane& other = lanes_[i];
            if (other.spec->host != spec.host || other.computing == idle || i == index) continue;
            const double prompts = other.computing, decodes = 1.0 - prompts;
            const double prompt = spec.prompt_contention[0] * prompts + spec.prompt_contention[1] * decodes;
            const double decode = spec.decode_contention[0] * prompts + spec.decode_contention[1] * decodes;
            more += prompt * lane.prompt_share + decode * (1.0 - lane.prompt_share) - 1.0;
            wanted += other.spec->cores;
        }
        if (wanted <= 1.0 || spec.cores == 0) return 1.0 + more;
        return wanted > spec.cores ? wanted * (1.0 + more * (1.0 - spec.cores) / (wanted - spec.cores)) : wanted;
    }

    static bool contends(const LaneSpec& spec) {
        return std::max({spec.prompt_contention[0], spec.prompt_contention[1], spec.decode_contention[0],
                         spec.decode_contention[1]}) > 1.0 || spec.cores > 0;
    }

    // It computes a step with this share of prompts from now on, or none, and the steps of the others on its host take
    // longer, or less long.
    void compute(int index, double prompts) {
        if (!contention_ || lanes_[index].computing == prompts) return;
        lanes_[index].computing = prompts;
        for (int i = 0; i < static_cast<int>(lanes_.size()); ++i) {
            const LaneSpec& other = *lanes_[i].spec;
            if (i != index && lanes_[i].busy && other.host == lanes_[index].spec->host && contends(other)) rescale(i);
        }
    }

    void rescale(int index) {
        Lane& lane = lanes_[index];
        if (lane.end_ms(lane.planned) <= now_) return;
        report_due(lane);
        if (const int64_t done = lane.jumping() ? steps_done(lane) : 0) {  // what is behind has had its time
            lane.busy_ms += lane.end_ms(done) - lane.start_ms;
            lane.start_ms = lane.end_ms(done);
            lane.done_ms -= lane.work_ms(done);
            lane.base_ms += done * lane.slope_ms;
            lane.planned -= done;
            advance(lane, done);
        }
        lane.done_ms += (now_ - lane.since_ms) / lane.slowdown;
        lane.since_ms = now_;
        lane.slowdown = slowdown(index);
        push(lane.end_ms(lane.planned), ending, index, step_ends, ++lane.version);
    }

    void join(Lane& lane, int index) {
        Request& r = requests_[index];
        r.at = At::decoding;
        r.joined_at = lane.steps;
        const int64_t needed = rounded_up((r.output - r.emitted) / lane.spec->tokens_per_step);
        lane.decoding.push_back({lane.steps + needed, index});
        std::push_heap(lane.decoding.begin(), lane.decoding.end(), std::greater<>());
        lane.context += r.target;
    }

    // A step needs room for what its decodes add. Who came last gives way, and is computed again later. No lane changes its
    // role here, so prompts beside decodes are decoded where they are.
    void make_room(Lane& lane) {
        while (!lane.decoding.empty() && lane.kv_used + lane.growth() > lane.spec->kv_tokens) {
            int last = lane.prompts.empty() ? -1 : *std::max_element(lane.prompts.begin(), lane.prompts.end());
            for (const auto& [_, index] : lane.decoding) last = std::max(last, index);
            preempt(lane, last);
        }
    }

    void preempt(Lane& lane, int index) {
        Request& r = requests_[index];
        if (r.at == At::decoding) {
            std::erase_if(lane.decoding, [index](const auto& entry) { return entry.second == index; });
            std::make_heap(lane.decoding.begin(), lane.decoding.end(), std::greater<>());
            leave(lane, r);
            keep_emitted(lane, r);
        } else {
            std::erase(lane.prompts, index);
            lane.kv_used -= r.target;
            --lane.seats;
            change(lane, 0, r.computed - r.target);
        }
        ++preemptions;
        r.target = r.prompt + r.emitted;
        r.at = At::waiting;
        r.p = r.d;  // computed again where it decodes
        r.reserved = false;
        change(lane, 0, r.target - r.cached);
        lane.waiting.push_front(index);
    }

    void keep_emitted(const Lane& lane, Request& r) const {
        r.emitted += static_cast<int>(std::floor(lane.spec->tokens_per_step * (lane.steps - r.joined_at)));
    }

    // What a decoding request held is free.
    void leave(Lane& lane, const Request& r) {
        const double held = lane.context_of(r);
        lane.kv_used -= held;
        lane.context -= held;
        --lane.seats;
    }

    double choose_chunks(Lane& lane) {
        double squares = 0.0;
        int64_t budget = lane.spec->chunk_tokens - static_cast<int64_t>(lane.decoding.size() * lane.spec->rows);
        for (int index : lane.prompts) squares += add_chunk(lane, index, budget);
        while (budget > 0 && !lane.waiting.empty() && has_room(lane, requests_[lane.waiting.front()])) {
            const int index = lane.waiting.front();
            lane.waiting.pop_front();
            admit(lane, requests_[index]);
            lane.prompts.push_back(index);
            squares += add_chunk(lane, index, budget);
        }
        return squares;
    }

    bool has_room(const Lane& lane, const Request& r) const {
        const double needed = lane.kv_used + lane.growth() + r.target + lane.spec->tokens_per_step;
        return lane.seats < lane.spec->max_sequences && needed <= lane.spec->kv_tokens;
    }

    void admit(Lane& lane, Request& r) {
        r.at = At::prompt;
        r.computed = r.cached;
        r.sent_ms = 0.0;
        lane.kv_used += r.target;
        ++lane.seats;
        if (r.p != r.d && lanes_[r.d].incoming.empty()) reserve(r);
    }

    double add_chunk(Lane& lane, int index, int64_t& budget) {
        const Request& r = requests_[index];
        const int64_t tokens = std::min<int64_t>(budget, r.target - r.computed);
        if (tokens <= 0) return 0.0;
        budget -= tokens;
        lane.chunks.push_back({index, static_cast<int>(tokens)});
        return static_cast<double>(tokens) * (2.0 * r.computed + tokens);
    }

    void start(int index, double squares) {
        Lane& lane = lanes_[index];
        const LaneSpec& spec = *lane.spec;
        const double sequences = lane.decoding.size(), rows = sequences * spec.rows;
        double tokens = 0.0;
        for (const auto& [_, chunk] : lane.chunks) tokens += chunk;
        const Coefficients& prompts = tokens < spec.large_tokens ? spec.prompt : spec.large_prompt;
        const double prompt_ms = tokens > 0 ? prompts.at(tokens, squares) : 0.0;
        double took = prompt_ms, drafting = 0.0;
        lane.slope_ms = 0.0;
        if (sequences > 0) {
            const Coefficients& c = rows < spec.large_rows ? spec.decode : spec.large_decode;
            const double decode_ms = c.at(lane.context + sequences, rows);
            const double saved = tokens > 0 ? spec.shared_ms * std::max(0.0, 1.0 - rows / spec.shared_rows) : 0.0;
            took = std::max({prompt_ms, decode_ms, prompt_ms + decode_ms - saved});
            drafting = spec.draft_ms + spec.draft_sequence_ms * sequences;
            lane.slope_ms = c.b * sequences * spec.tokens_per_step;
        }
        took += drafting + spec.every_step_ms;
        lane.busy = true;
        lane.advances = sequences > 0;
        lane.start_ms = lane.since_ms = now_;
        lane.base_ms = took;
        lane.prompt_share = tokens > 0 ? std::min(1.0, prompt_ms / took) : 0.0;
        lane.done_ms = 0.0;
        lane.slowdown = slowdown(index);
        lane.planned = lane.chunks.empty() ? undisturbed(lane) : 1;
    }

    // Steps until a decode ends or memory runs out.
    int64_t undisturbed(const Lane& lane) const {
        const double room = std::floor((lane.spec->kv_tokens - lane.kv_used) / lane.growth());
        const int64_t to_end = lane.decoding.front().first - lane.steps;
        return room < to_end ? std::max<int64_t>(1, room) : to_end;
    }

    // The least count of steps that end no earlier than then, at least one.
    int64_t steps_until(const Lane& lane, double at_ms) const {
        const double passed = lane.done_ms + (at_ms - lane.since_ms) / lane.slowdown, half = lane.slope_ms / 2, linear = lane.base_ms - half;
        const double root = half > 0 ? (std::sqrt(linear * linear + 4 * half * passed) - linear) / (2 * half)
                                     : passed / lane.base_ms;
        auto count = std::clamp<int64_t>(std::isfinite(root) ? root : 1, 1, lane.planned);
        while (count > 1 && lane.end_ms(count - 1) >= at_ms) --count;
        while (count < lane.planned && lane.end_ms(count) < at_ms) ++count;
        return count;
    }

    int64_t steps_done(const Lane& lane) const {
        if (!lane.busy) return 0;
        const int64_t count = steps_until(lane, now_);
        return lane.end_ms(count) <= now_ ? count : count - 1;
    }

    void cut_short(int index) {
        Lane& lane = lanes_[index];
        if (!lane.jumping()) return;
        const int64_t count = steps_until(lane, now_);
        if (count == lane.planned) return;
        lane.planned = count;
        push(lane.end_ms(count), ending, index, step_ends, ++lane.version);
    }

    void end(int index) {
        Lane& lane = lanes_[index];
        report_due(lane);
        lane.busy = false;
        lane.busy_ms += now_ - lane.start_ms;
        if (lane.advances) advance(lane, lane.planned);
        chunks_.swap(lane.chunks);
        lane.chunks.clear();
        for (const auto& [request, tokens] : chunks_) chunk_done(lane, request, tokens);
        if (!chunks_.empty()) std::erase_if(lane.prompts, [this](int i) { return requests_[i].at != At::prompt; });
        kick(index);
    }

    void advance(Lane& lane, int64_t steps) {
        const double tokens = steps * lane.growth();
        lane.steps += steps;
        lane.kv_used += tokens;
        lane.context += tokens;
        while (!lane.decoding.empty() && lane.decoding.front().first <= lane.steps) {
            const int index = lane.decoding.front().second;
            std::pop_heap(lane.decoding.begin(), lane.decoding.end(), std::greater<>());
            lane.decoding.pop_back();
            leave(lane, requests_[index]);
            finish(index);
        }
    }

    void finish(int index) {
        Request& r = requests_[index];
        r.at = At::done;
        last_[index] = now_;
        change(lanes_[r.d], -1, 0);
        if (now_ - first_[index] > targets_.tpot_ms * (r.output - 1)) miss(index, tpot);
        if (index >= ended_ && now_ - arrivals_[index] > targets_.e2e_ms) miss(index, e2e);
    }

    // --- limits ----------------------------------------------------------------------------------------------------

    // Once for a request and a metric; a window counts the request when it misses the first of its targets.
    void miss(int index, int64_t metric) {
        int& missed = requests_[index].missed;
        for (Window& window : windows_) {
            if (index < window.from || !(window.metrics & metric) || window.metrics & missed) continue;
            failed_ |= --window.allowed < 0;
        }
        missed |= metric;
    }

    // Whether the next request that is waited for has missed a target by now, whenever it will come.
    bool overdue(double now, int next, double target_ms) const {
        return next < static_cast<int>(requests_.size()) && now - arrivals_[next] > target_ms;
    }

    void chunk_done(Lane& lane, int index, int tokens) {
        Request& r = requests_[index];
        const int fresh = r.computed == r.cached ? tokens + r.cached : tokens;
        r.computed += tokens;
        change(lane, 0, -tokens);
        if (r.reserved) send(r, fresh);
        if (r.computed == r.target) prompt_done(lane, index);
    }

    void prompt_done(Lane& lane, int index) {
        Request& r = requests_[index];
        if (r.emitted++ == 0) {
            first_[index] = now_;
            if (index >= begun_ && now_ - arrivals_[index] > targets_.ttft_ms) miss(index, ttft);
        }
        if (r.emitted >= r.output) {
            lane.kv_used -= r.target;
            --lane.seats;
            return finish(index);
        }
        if (r.p == r.d) {
            r.at = At::joined;
            return lane.joined.push_back(index);
        }
        r.at = At::held;
        hand_over(index);
    }

    // --- hand-off --------------------------------------------------------------------------------------------------

    void hand_over(int index) {
        Request& r = requests_[index];
        Lane& to = lanes_[r.d];
        if (r.reserved) return push(std::max(now_, r.sent_ms), ending, index, kv_arrives, r.attempt);
        if (to.incoming.empty() && reserve(r)) return send_all(index);
        to.incoming.push_back(index);
    }

    bool reserve(Request& r) {
        Lane& lane = lanes_[r.d];
        if (lane.told->down || lane.seats >= lane.spec->max_sequences) return false;
        const double used = lane.kv_used + (lane.advances ? steps_done(lane) * lane.growth() : 0.0);
        if (used + lane.growth() + r.target + lane.spec->tokens_per_step > lane.spec->kv_tokens) return false;
        report_due(lane);
        lane.kv_used += r.target;
        ++lane.seats;
        r.reserved = true;
        if (lane.jumping() && lane.kv_used + lane.planned * lane.growth() > lane.spec->kv_tokens) cut_short(r.d);
        return true;
    }

    void send(Request& r, int tokens) {
        const int link = paths_[r.p * lanes_.size() + r.d];
        if (link < 0) return;
        link_free_[link] = std::max(link_free_[link], now_) + tokens * links_[link].ms_per_token;
        r.sent_ms = link_free_[link] + links_[link].latency_ms;
    }

    void send_all(int index) {
        Request& r = requests_[index];
        r.sent_ms = now_;
        send(r, r.target);
        push(r.sent_ms, ending, index, kv_arrives, r.attempt);
    }

    void kv_arrived(int index) {
        Request& r = requests_[index];
        release(r.p, r.target);
        r.at = At::joined;
        lanes_[r.d].joined.push_back(index);
        cut_short(r.d);
        kick(r.d);
    }

    void release(int index, int tokens) {
        report_due(lanes_[index]);
        lanes_[index].kv_used -= tokens;
        --lanes_[index].seats;
        cut_short(index);
        kick(index);
    }

    // --- failures --------------------------------------------------------------------------------------------------

    void fail(int index) {
        Lane& lane = lanes_[index];
        if (lane.told->down++) return;
        if (const int64_t done = lane.jumping() ? steps_done(lane) : 0) {
            lane.steps += done;
            lane.busy_ms += lane.end_ms(done) - lane.start_ms;
        }
        std::vector<int> lost, moved;
        for (int i = 0; i < static_cast<int>(requests_.size()); ++i) {
            const Request& r = requests_[i];
            if (r.at == At::done || r.at == At::router) continue;
            const bool decoded = r.at == At::joined || r.at == At::decoding;
            if ((decoded ? r.d : r.p) == index) lost.push_back(i);
            else if (r.d == index && !decoded) moved.push_back(i);
        }
        for (int i : lost) give_up(i);
        compute(index, idle);
        clear(lane);
        for (int i : moved) move(i);
        for (int i : lost) route(i);
    }

    void give_up(int index) {
        Request& r = requests_[index];
        if (r.at == At::decoding) keep_emitted(lanes_[r.d], r);
        const bool elsewhere = r.p != r.d && r.at != At::joined && r.at != At::decoding;
        if (elsewhere && r.reserved) release(r.d, r.target);
        if (elsewhere) std::erase(lanes_[r.d].incoming, index);
        change(lanes_[r.d], -1, 0);
        ++r.attempt;
    }

    void clear(Lane& lane) {
        lane.waiting.clear();
        lane.incoming.clear();
        lane.prompts.clear();
        lane.joined.clear();
        lane.decoding.clear();
        lane.chunks.clear();
        lane.kv_used = lane.context = 0.0;
        lane.seats = 0;
        lane.pending = lane.told->pending = lane.told->free = 0;
        lane.told->next_report_ms = 0.0;
        ++lane.version;
        lane.busy = false;
    }

    // Its decode lane is down: another one, wherever it is, if there is one.
    void move(int index) {
        Request& r = requests_[index];
        ++r.attempt;
        r.reserved = false;
        change(lanes_[r.d], -1, 0);
        if (const int d = least_live(r); d >= 0) r.d = d;
        send_to(lanes_[r.d], 1, 0, r.prompt);
        if (r.at == At::held) hand_over(index);
    }

    void repair(int index) {
        if (--told_[index].down) return;
        told_[index].next_report_ms = next_report_ms_ = 0.0;  // it comes back with a report
        std::vector<int> stranded;
        stranded.swap(stranded_);
        for (int i : stranded) route(i);
        kick(index);
    }

    std::vector<Lane> lanes_;
    std::vector<Told> told_;  // by lane
    std::vector<int> all_, takers_, givers_;  // lanes; those that decode, and those that only prefill
    double next_report_ms_ = 0.0;             // no lane that is up reports before
    std::vector<Request> requests_;
    std::vector<int> stranded_;
    std::vector<std::pair<int, int>> chunks_;
    std::priority_queue<Event, std::vector<Event>, std::greater<Event>> events_;
    std::priority_queue<int, std::vector<int>, std::greater<int>> starting_;  // lanes, at this instant, after the events
    const Link* links_;
    std::vector<double> link_free_;
    const int32_t* paths_;
    int64_t handoff_min_;
    double report_ms_;
    const Targets& targets_;
    std::vector<Window> windows_;  // of `allowed` what is left
    int begun_ = 0, ended_ = 0;    // requests before it that missed their first token, or their end, are counted
    bool failed_ = false;
    bool contention_ = false;
    const double* arrivals_ = nullptr;
    double *first_, *last_;
    double now_ = 0.0;
};

}  // namespace

extern "C" int64_t simulate_serving(const LaneSpec* lanes, int64_t num_lanes, const Link* links, int64_t num_links,
                                    const int32_t* paths, int64_t handoff_min_tokens, double report_ms,
                                    const Targets* targets, const Window* windows, int64_t num_windows,
                                    const Outage* outages, int64_t num_outages, int64_t num_requests, const double* arrivals,
                                    const int32_t* prompt, const int32_t* output, const int32_t* cached, double* first,
                                    double* last, double* busy_ms) {
    Serving serving(lanes, static_cast<int>(num_lanes), links, static_cast<int>(num_links), paths, handoff_min_tokens,
                    report_ms, *targets, windows, static_cast<int>(num_windows), first, last);
    const bool whole = serving.run(static_cast<int>(num_requests), arrivals, prompt, output, cached, outages,
                static_cast<int>(num_outages));
    for (int64_t i = 0; i < num_lanes; ++i) busy_ms[i] = serving.lanes()[i].busy_ms;
    return whole ? serving.preemptions : -1;
}
