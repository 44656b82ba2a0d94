"""The reference: SimMatch's step as loops over ranks, images, classes and bank rows, written from the paper.

Only the networks' forward and backward are PyTorch's. The methods of models/ must agree with it to rounding
in float64.
"""

import copy
import math

import torch


def softmax(values):
    """The softmax of a list of 0-dim tensors or floats."""
    top = max(float(torch.as_tensor(v).detach()) for v in values)
    powers = [torch.exp(torch.as_tensor(v, dtype=torch.float64) - top) for v in values]
    return [p / sum(powers) for p in powers]


def unfold(q, p, labels):
    """Row i: q[i][j] times the class probability of bank row j's label, normalized to sum 1."""
    out = []
    for q_i, p_i in zip(q, p):
        products = [q_ij * p_i[label] for q_ij, label in zip(q_i, labels)]
        out.append([product / sum(products) for product in products])
    return out


def aggregate(q, labels, num_classes):
    """Row i: for each class, the sum of q[i][j] over the bank rows of that class."""
    out = []
    for q_i in q:
        a_i = [0.0] * num_classes
        for q_ij, label in zip(q_i, labels):
            a_i[label] = a_i[label] + q_ij
        out.append(a_i)
    return out


def cross_entropy(p, q):
    """H(p, q) of two distributions."""
    return -sum(p_c * torch.log(torch.as_tensor(q_c, dtype=torch.float64)) for p_c, q_c in zip(p, q))


def align(p, ring, ptr, mean):
    """Write `mean` into the ring (a list of rows) at ptr, divide each row of p by the ring's mean, and
    normalize it to sum 1.
    """
    ring[ptr] = list(mean)
    prior = [sum(row[c] for row in ring) / len(ring) for c in range(len(mean))]
    out = []
    for p_i in p:
        ratios = [p_ic / prior_c for p_ic, prior_c in zip(p_i, prior)]
        out.append([ratio / sum(ratios) for ratio in ratios])
    return out


def cosines(z, bank):
    return [[sum(a * b for a, b in zip(z_i, row)) for row in bank] for z_i in z]


class SimMatchReference:
    """The state of a training: student, teacher, bank, labels, ring. `step` computes one step of all ranks.

    It has two networks. bn_mode: "shuffle" (the EMA teacher) or "average" (EMAN).
    """

    def __init__(
        self,
        network,
        bank,
        labels,
        num_classes,
        *,
        lambda_u,
        lambda_in,
        threshold,
        st,
        tt,
        c_smooth,
        DA,
        da_len,
        bank_m,
        ema_m,
        lr,
        momentum,
        wd,
        nesterov,
        no_decay_bn=False,
        bn_mode=None,
    ):
        self.student, self.teacher = copy.deepcopy(network), copy.deepcopy(network)
        self.teacher.requires_grad_(False)
        self.bank, self.labels = [row.clone() for row in bank], [int(label) for label in labels]
        self.ring, self.ptr = [[0.0] * num_classes for _ in range(da_len)], 0
        self.velocity = {}
        self.num_classes = num_classes
        self.h = dict(
            lambda_u=lambda_u,
            lambda_in=lambda_in,
            threshold=threshold,
            st=st,
            tt=tt,
            c_smooth=c_smooth,
            DA=DA,
            bank_m=bank_m,
            ema_m=ema_m,
            bn_mode=bn_mode,
            lr=lr,
            momentum=momentum,
            wd=wd,
            nesterov=nesterov,
            no_decay_bn=no_decay_bn,
        )

    def step(self, batches, step, first_epoch):
        """batches: one (x, y, index, u_weak, (u_strong, …)) for each rank. Returns the terms,
        pseudo-labels and masks. Terms of strong views are means over all of them.
        """
        h, n_x = self.h, len(batches[0][0])
        self.student.train()
        logits_x, logits_us, z_us, z_x, logits_uw, z_uw = self._forwards(
            batches, step
        )  # each [rank][image][…]
        p = [[softmax(row) for row in logits] for logits in logits_uw]  # [rank][image][class]
        everything = [row for rank in p for row in rank]
        mean = [sum(row[c] for row in everything) / len(everything) for c in range(self.num_classes)]
        if h["DA"]:
            p = [align(rank, self.ring, self.ptr, mean) for rank in p]
            self.ptr = (self.ptr + 1) % len(self.ring)

        totals = {"loss_x": 0.0, "loss_u": 0.0, "loss_in": 0.0}
        pseudo, masks = [], []
        for rank, (_, y, _, _, strong_views) in enumerate(batches):
            target, views = p[rank], len(strong_views)
            loss_in = 0.0
            if not first_epoch:
                q_w = [softmax([c / h["tt"] for c in row]) for row in cosines(z_uw[rank], self.bank)]
                q_hat = unfold(q_w, p[rank], self.labels)
                share = aggregate(q_w, self.labels, self.num_classes)
                target = [
                    [h["c_smooth"] * p_c + (1 - h["c_smooth"]) * a_c for p_c, a_c in zip(p_i, a_i)]
                    for p_i, a_i in zip(p[rank], share)
                ]
                q_s = [softmax([c / h["st"] for c in row]) for row in cosines(z_us[rank], self.bank)]
                loss_in = sum(cross_entropy(a, b) for a, b in zip(views * q_hat, q_s, strict=True)) / len(q_s)
            mask = [1.0 if max(float(v) for v in row) >= h["threshold"] else 0.0 for row in target]
            strong = zip(views * mask, views * target, logits_us[rank], strict=True)
            loss_u = sum(m * cross_entropy(a, softmax(b)) for m, a, b in strong) / (views * len(target))
            loss_x = sum(-torch.log(softmax(row)[int(label)]) for row, label in zip(logits_x[rank], y)) / n_x
            totals["loss_x"] += loss_x / len(batches)
            totals["loss_u"] += h["lambda_u"] * loss_u / len(batches)
            totals["loss_in"] += h["lambda_in"] * loss_in / len(batches)
            pseudo.append([[float(v) for v in row] for row in target])
            masks.append(mask)

        before = list(self.bank)
        for rank, (_, y, index, _, _) in enumerate(batches):  # the bank of the next step
            for j in range(n_x):
                self.bank[int(index[j])] = self._row(before[int(index[j])], z_x[rank][j])
                self.labels[int(index[j])] = int(y[j])
        self._sgd(sum(totals.values()))
        self._average()
        return {name: float(torch.as_tensor(value).detach()) for name, value in totals.items()}, pseudo, masks

    def _forwards(self, batches, step):
        """logits_x, logits_us, z_us of the student; z_x, logits_uw, z_uw of the teacher. Each a list over
        ranks.
        """
        n_x = len(batches[0][0])
        logits_t, z_t = self._teacher_forward([torch.cat([b[0], b[3]]) for b in batches], step)
        student = [
            self._student_forwards([torch.cat([b[0], b[4][0]]), *b[4][1:]], first=i == 0)
            for i, b in enumerate(batches)
        ]
        return (
            [logits[:n_x] for logits, _ in student],
            [logits[n_x:] for logits, _ in student],
            [z[n_x:] for _, z in student],
            [z[:n_x] for z in z_t],
            [logits[n_x:] for logits in logits_t],
            [z[n_x:] for z in z_t],
        )

    def _row(self, old, z):
        """The bank row after the step."""
        mixed = [self.h["bank_m"] * a + (1 - self.h["bank_m"]) * b for a, b in zip(old, z)]
        length = math.sqrt(sum(float(v) ** 2 for v in mixed))
        return torch.stack([v / length for v in mixed])

    def _student_forwards(self, inputs, first):
        """One forward for each input; the outputs are concatenated."""
        logits, z = zip(*(self._student_forward(x, first) for x in inputs))
        return torch.cat(logits), torch.cat(z)

    def _student_forward(self, x, first):
        """The running statistics are the first rank's, which all ranks have after a broadcast."""
        if first:
            return self.student(x)
        own = {name: buffer.clone() for name, buffer in self.student.named_buffers()}
        return torch.func.functional_call(self.student, own, (x,))

    @torch.no_grad()
    def _teacher_forward(self, inputs, step):
        self.teacher.train(self.h["bn_mode"] == "shuffle")
        n, world = len(inputs[0]), len(inputs)
        if self.h["bn_mode"] == "average" or world == 1:
            outputs = [self.teacher(x) for x in inputs]
            return [logits for logits, _ in outputs], [z for _, z in outputs]
        # shuffle-BN: global image i moves to index slot[i]; indices g·n … g·n+n−1 are one BN group
        slot = torch.randperm(world * n, generator=torch.Generator().manual_seed(step)).tolist()
        images = torch.cat(inputs)
        logits, z = [None] * (world * n), [None] * (world * n)
        for group in range(world):
            members = [i for i in range(world * n) if slot[i] // n == group]
            kept = copy.deepcopy(dict(self.teacher.named_buffers()))
            group_logits, group_z = self.teacher(images[members])
            if group > 0:
                for name, buffer in self.teacher.named_buffers():
                    buffer.copy_(kept[name])
            for place, i in enumerate(members):
                logits[i], z[i] = group_logits[place], group_z[place]
        split = [slice(r * n, (r + 1) * n) for r in range(world)]
        return [torch.stack(logits[s]) for s in split], [torch.stack(z[s]) for s in split]

    def _sgd(self, loss):
        h = self.h
        parameters = dict(self.student.named_parameters())
        bn = {
            f"{name}.{kind}"
            for name, module in self.student.named_modules()
            if isinstance(module, torch.nn.BatchNorm2d)
            for kind in ("weight", "bias")
        }
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        with torch.no_grad():
            for (name, p), g in zip(parameters.items(), gradients):
                if g is None:
                    continue
                if not (h["no_decay_bn"] and (name in bn or name.endswith(".bias"))):
                    g = g + h["wd"] * p
                v = self.velocity.get(name)
                self.velocity[name] = v = g if v is None else h["momentum"] * v + g
                p -= h["lr"] * (g + h["momentum"] * v if h["nesterov"] else v)

    @torch.no_grad()
    def _average(self):
        m, student = self.h["ema_m"], dict(self.student.named_parameters())
        for name, p in self.teacher.named_parameters():
            p.copy_(m * p + (1 - m) * student[name])
        if self.h["bn_mode"] == "average":
            student = dict(self.student.named_buffers())
            for name, b in self.teacher.named_buffers():
                b.copy_(student[name] if "num_batches" in name else m * b + (1 - m) * student[name])


class SimMatchSingleReference(SimMatchReference):
    """SimMatch with one network, which also predicts the weak views. The teacher is for evaluation and copies
    the network's buffers.
    """

    def _forwards(self, batches, step):
        n_x, n_u = len(batches[0][0]), len(batches[0][3])
        out = [
            self._student_forwards([torch.cat([b[0], b[3], b[4][0]]), *b[4][1:]], first=i == 0)
            for i, b in enumerate(batches)
        ]
        return (
            [logits[:n_x] for logits, _ in out],
            [logits[n_x + n_u :] for logits, _ in out],
            [z[n_x + n_u :] for _, z in out],
            [z[:n_x].detach() for _, z in out],
            [logits[n_x : n_x + n_u].detach() for logits, _ in out],
            [z[n_x : n_x + n_u].detach() for _, z in out],
        )

    @torch.no_grad()
    def _average(self):
        """The statistics are the first rank's, as those of the student."""
        super()._average()
        for mine, theirs in zip(self.teacher.buffers(), self.student.buffers()):
            mine.copy_(theirs)


def all_finite(values):
    return all(math.isfinite(float(torch.as_tensor(v).detach())) for v in values)
