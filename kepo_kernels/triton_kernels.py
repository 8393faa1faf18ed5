"""The Triton kernels of the row contract; a program works on one section of one row.

    softmax_kernel      logits of a section           -> its peak, sum of e^x and sum of x e^x
    divergence_kernel   both logits of a section      -> its share of KL(q|m) and KL(p|m)
    finish_kernel       what a row's sections found   -> the row's column of the table
    backward_kernel     the table, and a section      -> its dlogits

Rows are cut where the vocabulary says and nothing else, so few rows fill a GPU as well as many do,
and a row's bits depend neither on its neighbours nor on their number. There are no atomics. Offsets
of rows are 64-bit (row 14,134 of a 151,936-token vocabulary reaches past 2^31 elements).

    parts         (n, 3 * sections)         of the student's softmaxes, or of the teacher's
    divergences   (n, 2 * shared sections)
    targets       (n,)                     -1: none
    KIND          "none" (no teacher), "forward" (beta = 0), "reverse" (beta = 1) or "mixture"
"""

from kepo_kernels.triton_math import (
    cap_slope,
    capped,
    jit,
    merged,
    mixture,
    policy_grad,
    read,
    reduce,
    scan,
    section_columns,
    tl,
    weighted,
)


@jit
def softmax_kernel(
    logits,
    parts,
    stride,
    vocab,
    shared,
    inverse_temperature,
    softcap,
    CAPPED: tl.constexpr,
    SECTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    section = tl.program_id(1)
    sections = tl.num_programs(1)
    begin, end = section_columns(section, shared, vocab, SECTION)
    peak, total, moment = scan(
        logits + row * stride, begin, end, inverse_temperature, softcap, CAPPED, BLOCK
    )
    peak, total, moment = reduce(peak, total, moment, inverse_temperature)
    parts += row * (3 * sections) + section
    tl.store(parts, peak)
    tl.store(parts + sections, total)
    tl.store(parts + 2 * sections, moment)


@jit(do_not_specialize=["sections"])
def divergence_kernel(
    logits,
    teacher,
    parts,
    teacher_parts,
    divergences,
    logits_stride,
    teacher_stride,
    sections,
    shared,
    beta,
    inverse_temperature,
    inverse_teacher_temperature,
    softcap,
    teacher_softcap,
    KIND: tl.constexpr,
    CAPPED: tl.constexpr,
    SECTION: tl.constexpr,
    SECTIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    section = tl.program_id(1)
    inside = tl.num_programs(1)
    logits += row * logits_stride
    teacher += row * teacher_stride
    peak, total, _ = merged(parts, row, inside, sections, inverse_temperature, SECTIONS)
    log_sum = tl.log(total)
    inverse = inverse_teacher_temperature
    teacher_peak, total, _ = merged(teacher_parts, row, inside, inside, inverse, SECTIONS)
    teacher_log_sum = tl.log(total)

    # Each KL is summed as a log(a/b) - a + b: every term is >= 0, and rounding of the log-sums
    # cancels to first order. A closed form of sums taken in the first pass would spare this one,
    # but it is a difference of numbers near 1, and so is wrong where student and teacher agree.
    student_lanes = tl.zeros((BLOCK,), tl.float32)
    teacher_lanes = student_lanes
    begin, end = section_columns(section, shared, shared, SECTION)
    for start in range(begin, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = read(logits, column, end, softcap, CAPPED, "")
        y = read(teacher, column, end, teacher_softcap, CAPPED, "")
        log_q = (z - peak) * inverse_temperature - log_sum
        log_p = (y - teacher_peak) * inverse - teacher_log_sum
        if KIND == "mixture":
            q, p, log_q_m, log_p_m = mixture(log_q, log_p, beta)
            # m - q and m - p, written so that nothing cancels when p is close to q.
            student_lanes += weighted(q, log_q_m) + beta * (p - q)
            teacher_lanes += weighted(p, log_p_m) + (1.0 - beta) * (q - p)
        else:
            q, p = tl.exp(log_q), tl.exp(log_p)
            if KIND == "forward":
                teacher_lanes += weighted(p, log_p - log_q) - p + q
            else:
                student_lanes += weighted(q, log_q - log_p) - q + p
    divergences += row * (2 * inside) + section
    tl.store(divergences, tl.sum(student_lanes, 0))
    tl.store(divergences + inside, tl.sum(teacher_lanes, 0))


@jit(do_not_specialize=["rows", "sections", "inside"])
def finish_kernel(
    logits,
    targets,
    parts,
    teacher_parts,
    divergences,
    table,
    logits_stride,
    rows,
    sections,
    inside,
    beta,
    inverse_temperature,
    inverse_teacher_temperature,
    softcap,
    KIND: tl.constexpr,
    CAPPED: tl.constexpr,
    SECTIONS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    peak, total, moment = merged(parts, row, sections, sections, inverse_temperature, SECTIONS)
    log_sum = tl.log(total)
    shared_peak, shared_total, _ = merged(
        parts, row, inside, sections, inverse_temperature, SECTIONS
    )

    target = tl.load(targets + row)
    logit = tl.load(logits + row * logits_stride + target, mask=target >= 0, other=0.0)
    logit = logit.to(tl.float32)
    if CAPPED:
        logit = capped(logit, softcap)
    logprob = tl.where(target >= 0, (logit - peak) * inverse_temperature - log_sum, 0.0)

    divergence = 0.0
    student_kl = 0.0
    teacher_peak = 0.0
    teacher_log_sum = 0.0
    if KIND != "none":
        inverse = inverse_teacher_temperature
        teacher_peak, teacher_total, _ = merged(
            teacher_parts, row, inside, inside, inverse, SECTIONS
        )
        teacher_log_sum = tl.log(teacher_total)
        lanes = tl.arange(0, SECTIONS)
        divergences += row * (2 * inside) + lanes
        student_kl = tl.sum(tl.load(divergences, mask=lanes < inside, other=0.0), 0)
        teacher_kl = tl.sum(tl.load(divergences + inside, mask=lanes < inside, other=0.0), 0)
        if KIND == "forward":
            divergence = teacher_kl
        elif KIND == "reverse":
            divergence = student_kl
        else:
            divergence = (1.0 - beta) * student_kl + beta * teacher_kl

    # In the order of RowStats. `rows` is widened because the table is nine times as long.
    rows = tl.cast(rows, tl.int64)
    table += row
    tl.store(table, logprob)
    tl.store(table + rows, divergence)
    tl.store(table + 2 * rows, log_sum - moment / total)
    tl.store(table + 3 * rows, peak)
    tl.store(table + 4 * rows, log_sum)
    shared_log_sum = (shared_peak - peak) * inverse_temperature + tl.log(shared_total)
    tl.store(table + 5 * rows, shared_log_sum)
    tl.store(table + 6 * rows, teacher_peak)
    tl.store(table + 7 * rows, teacher_log_sum)
    tl.store(table + 8 * rows, student_kl)


@jit(do_not_specialize=["rows"])
def backward_kernel(
    logits,
    targets,
    teacher,
    table,
    coefficients,
    out,
    logits_stride,
    teacher_stride,
    out_stride,
    rows,
    vocab,
    shared,
    beta,
    inverse_temperature,
    inverse_teacher_temperature,
    softcap,
    teacher_softcap,
    KIND: tl.constexpr,
    CAPPED: tl.constexpr,
    SECTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    section = tl.program_id(1)
    begin, end = section_columns(section, shared, vocab, SECTION)
    rows = tl.cast(rows, tl.int64)
    logits += row * logits_stride
    out += row * out_stride
    table += row
    entropy = tl.load(table + 2 * rows)
    peak = tl.load(table + 3 * rows)
    log_sum = tl.load(table + 4 * rows)
    coefficients += row
    e = tl.load(coefficients + 2 * rows)
    target = tl.load(targets + row).to(tl.int32)  # it meets columns, which are
    c = tl.where(target >= 0, tl.load(coefficients), 0.0)  # without a target logprob is a constant

    distils = False
    if KIND != "none":
        distils = begin < shared
        teacher += row * teacher_stride
        g = tl.load(coefficients + rows)
        shared_log_sum = tl.load(table + 5 * rows)
        teacher_peak = tl.load(table + 6 * rows)
        teacher_log_sum = tl.load(table + 7 * rows)
        student_kl = tl.load(table + 8 * rows)
    for start in range(begin, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        # Nobody reads these logits again.
        raw = read(logits, column, end, softcap, False, "evict_first")
        z = capped(raw, softcap) if CAPPED else raw
        x = (z - peak) * inverse_temperature
        grad = policy_grad(x - log_sum, column == target, c, e, entropy)
        if KIND != "none":  # noqa: SIM102 - a constant, which leaves the code out; the next is a number
            if distils:
                y = read(teacher, column, end, teacher_softcap, CAPPED, "evict_first")
                log_q = x - shared_log_sum
                log_p = (y - teacher_peak) * inverse_teacher_temperature - teacher_log_sum
                if KIND == "mixture":
                    q, _, log_q_m, _ = mixture(log_q, log_p, beta)
                    grad += g * (1.0 - beta) * weighted(q, log_q_m - student_kl)
                elif KIND == "reverse":
                    grad += g * weighted(tl.exp(log_q), log_q - log_p - student_kl)
                else:
                    grad += g * (tl.exp(log_q) - tl.exp(log_p))
        grad *= inverse_temperature
        if CAPPED:
            grad *= cap_slope(raw, softcap)
        tl.store(out + column, grad.to(out.dtype.element_ty), mask=column < end)
