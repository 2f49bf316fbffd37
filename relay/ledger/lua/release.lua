-- ARGV: seconds of a lease, then for each message: id, digest, recipients (JSON), time accepted (0 for now), number of
-- backups, their names, and who takes a lease of which: "<number>=<worker>", separated by blanks.
-- Returns for each 1, 2 where it covers an uncertain twin, 0 where it was in neither state.
-- Only what was staged or uncertain becomes pending: a repeated release must not revive a settled copy.
local seconds, now = clock()
local has_twins = redis.call('EXISTS', 'smtpdup:twins') == 1
local result = {}
local due = {}
local leased, held = {}, {}
local i = 2

local function no_longer_uncertain(id, digest)
  redis.call('HDEL', 'smtpdup:covered', id)
  local others = {}
  for other in string.gmatch(redis.call('HGET', 'smtpdup:twins', digest) or '', '%S+') do
    if other ~= id then others[#others + 1] = other end
  end
  if #others == 0 then
    redis.call('HDEL', 'smtpdup:twins', digest)
  else
    redis.call('HSET', 'smtpdup:twins', digest, table.concat(others, ' '))
  end
end

-- Added to the index in the same script: no list is ever missing there, however old or empty Redis was.
local function flush(name)
  redis.call('SADD', 'smtpdup:lists', name)
  redis.call('ZADD', 'smtpdup:pending:' .. name, unpack(due[name]))
  due[name] = nil
  if leased[name] then
    redis.call('ZADD', 'smtpdup:busy:' .. name, unpack(leased[name]))
    redis.call('HSET', 'smtpdup:holders:' .. name, unpack(held[name]))
    leased[name], held[name] = nil, nil
  end
end

local function lease(name, id, worker)
  local leases, holders = leased[name] or {}, held[name] or {}
  leased[name], held[name] = leases, holders
  leases[#leases + 1] = seconds + tonumber(ARGV[1])
  leases[#leases + 1] = id
  holders[#holders + 1] = id
  holders[#holders + 1] = worker
end

while i <= #ARGV do
  local id, digest, recipients, accepted = ARGV[i], ARGV[i + 1], ARGV[i + 2], tonumber(ARGV[i + 3])
  local count = tonumber(ARGV[i + 4])
  i = i + 5
  local moved = redis.call('ZREM', 'smtpdup:staged', id)
  if moved == 0 then
    moved = redis.call('ZREM', 'smtpdup:uncertain', id)
    if moved == 1 then no_longer_uncertain(id, digest) end
  end
  if moved == 1 then
    if has_twins and digest ~= '' and cover_twins(digest, recipients) then moved = 2 end
    if count == 0 then redis.call('DEL', 'smtpdup:message:' .. id) end
    local score = accepted > 0 and accepted < seconds and ARGV[i - 2] or now
    for n, worker in string.gmatch(ARGV[i + count], '(%d+)=(%S+)') do lease(ARGV[i + n - 1], id, worker) end
    for n = 0, count - 1 do
      local name = ARGV[i + n]
      local list = due[name] or {}
      due[name] = list
      list[#list + 1] = score
      list[#list + 1] = id
      -- Lua takes some 8,000 arguments; an error at the end would lose what has left the other list already.
      if #list >= 2000 then flush(name) end
    end
  end
  i = i + count + 1
  result[#result + 1] = moved
end
for name in pairs(due) do flush(name) end
return result
